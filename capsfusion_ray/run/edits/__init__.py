"""Edits of a finished output that fuse rows again: retry and repair."""
