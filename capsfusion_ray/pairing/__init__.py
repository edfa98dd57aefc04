"""Join a table of raw captions with a table of synthetic captions."""
