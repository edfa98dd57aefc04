"""What people look at: the report page and the terminal view of an output."""
