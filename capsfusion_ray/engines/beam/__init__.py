"""Beam search for models with the Llama architecture. It writes the same captions as HF's `generate`, token for token.

A finished caption's slot goes to the next prompt at once. This package uses torch and knows no Ray.

Read the files in this order: `search` (the arithmetic of beam search), `architectures` (which models can run), `weights`
(what a model becomes), `cache` (keys and values of prefix, suffix and generated tokens), `kernels/` (attention and
elementwise operations in plain torch, and their faster versions `*_triton`, `*_numba` and `*_onednn`), `network`
(prefill, and one decode step), `slots` (how many captions are decoded together), `engine` (prompts wait in a queue,
captions are decoded in slots), `cpu_threads` (one engine per CPU thread).

Letters of shapes: B rows (captions in slots), K beams, C candidates, V vocabulary, T max_new_tokens, P prefix tokens,
S suffix tokens, N cache columns of a row, H key/value heads, G query heads per key/value head, D head size, E hidden size.
"""
