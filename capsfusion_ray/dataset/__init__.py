"""The files of an output: written, read, changed and checked. Knows stores; no Ray, no torch."""
