"""Engines write fused captions. `base` has the protocol and the table of kinds; torch is imported only inside an engine."""
