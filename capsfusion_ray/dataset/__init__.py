"""The files of an output: how they are written, read back, changed and checked. Knows stores; no Ray, no torch."""
