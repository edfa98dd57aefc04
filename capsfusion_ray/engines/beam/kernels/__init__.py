"""The numeric kernels of the beam engine, and the same operations in plain torch."""
