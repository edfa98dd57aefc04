"""The decode attention on a GPU as one Triton kernel, with a length per row and masked columns.

The tests compare it with `attention.decode_attention`. Plain torch reads as many columns as the longest row has, and
writes the scores to memory. This kernel reads only the columns that a row uses, once for all its beams, and writes only
the result. The prefix, which all rows read, stays in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # columns per step of the loop
MIN_QUERIES = 16  # the smallest side of a tl.dot


@triton.jit
def _tile(q, k, v, seen, scale, top, total, acc):  # type: ignore[no-untyped-def]
    """Add one tile of columns to an online softmax. q [M, D]; k and v [N, D]; seen [M, N]; top, total [M]; acc [M, D]."""
    scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    safe_top = tl.where(
        new_top == float("-inf"), 0.0, new_top
    )  # before the first visible column: exp(-inf - 0) = 0, not NaN
    weights = tl.exp(scores - safe_top[:, None])
    old = tl.exp(top - safe_top)
    total = total * old + tl.sum(weights, 1)
    acc = acc * old[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return new_top, total, acc


@triton.jit
def _decode_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    prefix_k_ptr,
    prefix_v_ptr,
    k_ptr,
    v_ptr,
    visible_ptr,
    end_ptr,
    out_ptr,
    scale,
    prefix_tokens,
    columns,
    heads,
    GROUP: tl.constexpr,
    BEAMS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program computes one key/value head of one row, for all its beams and query heads."""
    row, head = tl.program_id(0), tl.program_id(1)
    m = tl.arange(0, QUERIES)
    d = tl.arange(0, HEAD_SIZE)
    n = tl.arange(0, COLUMNS)
    real = m < GROUP * BEAMS
    beam = m % BEAMS
    at = (row * heads + head).to(tl.int64)
    q_at = (at * GROUP * BEAMS + m[:, None]) * HEAD_SIZE + d[None, :]
    q = tl.load(q_ptr + q_at, mask=real[:, None], other=0.0)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, HEAD_SIZE), tl.float32)

    for first in range(0, prefix_tokens, COLUMNS):
        inside = first + n < prefix_tokens
        kv_at = (head * prefix_tokens + first + n[:, None]) * HEAD_SIZE + d[None, :]
        k = tl.load(prefix_k_ptr + kv_at, mask=inside[:, None], other=0.0)
        v = tl.load(prefix_v_ptr + kv_at, mask=inside[:, None], other=0.0)
        top, total, acc = _tile(q, k, v, inside[None, :] & real[:, None], scale, top, total, acc)

    end = tl.load(end_ptr + row)
    for first in range(0, end, COLUMNS):
        column = first + n
        inside = column < end
        kv_at = (at * columns + column[:, None]) * HEAD_SIZE + d[None, :]
        k = tl.load(k_ptr + kv_at, mask=inside[:, None], other=0.0)
        v = tl.load(v_ptr + kv_at, mask=inside[:, None], other=0.0)
        seen_at = (row * BEAMS + beam[:, None]) * columns + column[None, :]
        seen = tl.load(visible_ptr + seen_at, mask=inside[None, :] & real[:, None], other=0) != 0
        top, total, acc = _tile(q, k, v, seen, scale, top, total, acc)

    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + q_at, out.to(out_ptr.dtype.element_ty), mask=real[:, None])


def decode_attention_triton(
    q_BHGKD: Tensor,
    prefix_k_HPD: Tensor,
    prefix_v_HPD: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    visible_BKN: Tensor,
    end_B: Tensor,
) -> Tensor:
    """Attend from K beams of each row to the shared prefix and to the row's columns before its end. Returns [B, H, G, K, D].

    `k_BHND`, `v_BHND` and `visible_BKN` are whole cache tensors, contiguous. Their first B rows are read. D must be a
    power of 2.
    """
    b, h, g, k, d = q_BHGKD.shape
    q = q_BHGKD.contiguous()
    out = torch.empty_like(q)
    queries = max(MIN_QUERIES, triton.next_power_of_2(g * k))
    _decode_kernel[(b, h)](
        q,
        prefix_k_HPD,
        prefix_v_HPD,
        k_BHND,
        v_BHND,
        visible_BKN.view(torch.uint8),
        end_B,
        out,
        d**-0.5,
        prefix_k_HPD.shape[1],
        k_BHND.shape[2],
        h,
        GROUP=g,
        BEAMS=k,
        HEAD_SIZE=d,
        QUERIES=queries,
        COLUMNS=TILE,
    )
    return out
