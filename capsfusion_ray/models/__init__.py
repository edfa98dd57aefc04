"""Model folders: what a model wants, and one copy of it per node."""
