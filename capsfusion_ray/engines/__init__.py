"""The engines, which write fused captions. `base` has the protocol and the table of engines; only the engines import torch."""
