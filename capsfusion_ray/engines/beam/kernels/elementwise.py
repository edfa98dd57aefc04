"""A layer's operations number by number, in plain torch: what the kernels of elementwise_numba.py are compared with. T tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """RMS norm of the last dimension with HF's order of roundings: float32 inside, the weight in the model's dtype."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight_E * y.to(x.dtype)


def rotate(heads_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """RoPE: every head turned by its token's angles, as HF pairs the channels; what it is given may be overwritten."""
    half = heads_THD.shape[-1] // 2
    turned = torch.cat((-heads_THD[..., half:], heads_THD[..., :half]), dim=-1)
    return torch.addcmul(heads_THD * cos_TD[:, None], turned, sin_TD[:, None])
