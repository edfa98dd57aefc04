"""Beam search for Llama-shaped models, exact as HF's `generate`, with in-flight refill. Knows torch, no Ray.

The story, in reading order: `search` (beam arithmetic) -> `weights` (what a checkpoint becomes) -> `cache` (prefix, suffix
and generated KV) -> `attention`, `elementwise` and what stands in for them on a device (`*_triton`, `*_numba`, `*_onednn`)
-> `network` (prefill and one decode step) -> `engine` (rows in slots, refilled as captions finish) -> `lanes` (on a CPU:
several engines side by side).

Letters of shapes: B rows (captions in slots), K beams, C candidates, V vocabulary, T max_new_tokens, P prefix tokens,
S suffix tokens, N cache columns of a row, H key/value heads, G query heads per key/value head, D head size.
"""
