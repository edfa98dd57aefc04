"""The norm and the rotary embedding of a layer in plain torch. The tests compare elementwise_numba.py with it. T tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, rounded as in HF: float32 inside, the weight in the model's dtype."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight_E * y.to(x.dtype)


def rotate(heads_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate each head by the angles of its token (RoPE), with channels paired as in HF. It may overwrite its input."""
    half = heads_THD.shape[-1] // 2
    turned = torch.cat((-heads_THD[..., half:], heads_THD[..., :half]), dim=-1)
    return torch.addcmul(heads_THD * cos_TD[:, None], turned, sin_TD[:, None])
