"""Attention of one decode step and of a prefill, in plain torch. The tests compare the kernels with it. Knows no weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_attention(
    q_BHGKD: Tensor,
    prefix_k_HPD: Tensor,
    prefix_v_HPD: Tensor,
    k_BHWD: Tensor,
    v_BHWD: Tensor,
    mask_BKW: Tensor,
) -> Tensor:
    """Attend from K beams of each row to the shared prefix and to the row's own columns. Returns [B, H, G, K, D].

    `mask_BKW` is added to the scores: 0 where a beam sees a column, -inf elsewhere. All rows share the prefix, so one
    matrix product covers all rows and beams. A row's own columns are read once for all its beams.
    """
    b, h, g, k, d = q_BHGKD.shape
    p, w = prefix_k_HPD.shape[1], k_BHWD.shape[2]
    if not p:
        mask = mask_BKW[:, None] if g == 1 else mask_BKW[:, None].repeat(1, 1, g, 1)
        return F.scaled_dot_product_attention(q_BHGKD.reshape(b, h, g * k, d), k_BHWD, v_BHWD, mask).view(b, h, g, k, d)
    q = (q_BHGKD * d**-0.5).reshape(b, h, g * k, d)
    # The softmax is computed in at least float32, as in HF. In bfloat16 the products are rounded before it; the Triton
    # kernel does not round them.
    scores = torch.empty(b, h, g, k, p + w, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    scores[..., :p] = by_head(q, prefix_k_HPD.transpose(1, 2)).view(b, h, g, k, p)
    torch.add((q @ k_BHWD.transpose(2, 3)).view(b, h, g, k, w), mask_BKW[:, None, None], out=scores[..., p:])
    weights = scores.softmax(dim=-1).to(q.dtype).view(b, h, g * k, p + w)
    return (weights[..., p:] @ v_BHWD + by_head(weights[..., :p], prefix_v_HPD)).view(b, h, g, k, d)


def by_head(x_BHMI: Tensor, shared_HIJ: Tensor) -> Tensor:
    """Multiply all rows by a matrix that they share, in one matrix product per head. Returns [B, H, M, J], contiguous."""
    b, h, m, i = x_BHMI.shape
    product_HNJ = x_BHMI.transpose(0, 1).reshape(h, b * m, i) @ shared_HIJ
    return product_HNJ.view(h, b, m, -1).transpose(0, 1).contiguous()


def prefill_attention(
    q_BHGSD: Tensor, prefix_k_HPD: Tensor, prefix_v_HPD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask_SC: Tensor
) -> Tensor:
    """Attend from suffixes to the prefix and, causally, to themselves. Returns [B, H, G, S, D].

    `mask_SC` is boolean, over the columns of the prefix followed by those of the suffix.
    """
    b, h, g, s, d = q_BHGSD.shape
    keys = torch.cat((prefix_k_HPD.expand(b, -1, -1, -1), k_BHSD), dim=2)
    values = torch.cat((prefix_v_HPD.expand(b, -1, -1, -1), v_BHSD), dim=2)
    out = F.scaled_dot_product_attention(
        q_BHGSD.reshape(b, h * g, s, d), keys, values, attn_mask=mask_SC, enable_gqa=g > 1
    )
    return out.view(b, h, g, s, d)
