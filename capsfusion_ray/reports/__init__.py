"""What people look at: the report page, and the view of an output in the terminal."""
