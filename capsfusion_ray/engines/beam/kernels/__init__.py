"""The numeric kernels of the beam engine, and their plain torch twins."""
