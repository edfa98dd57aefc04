"""The operations of elementwise.py on a CPU, compiled by numba. float32 only.

Each takes one pass over memory, where torch takes six.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from capsfusion_ray.engines.beam.kernels.attention_numba import compiled


@compiled
def _rms_norm(x, weight, eps, out):  # type: ignore[no-untyped-def]
    """Normalise x [T, E] into out [T, E]."""
    tokens, size = x.shape
    for t in range(tokens):
        total = np.float32(0)
        for e in range(size):
            total += x[t, e] * x[t, e]
        scale = np.float32(1) / np.sqrt(total / np.float32(size) + eps)
        for e in range(size):
            out[t, e] = weight[e] * (x[t, e] * scale)


@compiled
def _rotate(heads, cos, sin):  # type: ignore[no-untyped-def]
    """Rotate heads [T, H, D] in place."""
    tokens, number, size = heads.shape
    half = size // 2
    for t in range(tokens):
        for h in range(number):
            for d in range(half):
                low, high = heads[t, h, d], heads[t, h, d + half]
                heads[t, h, d] = low * cos[t, d] - high * sin[t, d]
                heads[t, h, d + half] = high * cos[t, d + half] + low * sin[t, d + half]


def rms_norm_numba(x: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    out, size = torch.empty_like(x), x.shape[-1]
    _rms_norm(x.view(-1, size).numpy(), weight_E.numpy(), np.float32(eps), out.view(-1, size).numpy())
    return out


def rotate_numba(heads_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    _rotate(heads_THD.numpy(), cos_TD.numpy(), sin_TD.numpy())
    return heads_THD
