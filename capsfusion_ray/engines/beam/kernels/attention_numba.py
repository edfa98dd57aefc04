"""The decode attention on a CPU, compiled by numba. float32 only.

The tests compare it with `attention.decode_attention`. Plain torch calls one matrix product per row and head, each with
only three queries, and the calls take most of the time. This kernel reads each column once for all beams of its row,
skips columns that no beam sees, and reads only as many columns as the row uses. It runs in the thread that calls it;
`cpu_threads` calls it from several.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from capsfusion_ray.engines.beam.kernels.attention import by_head

# The compiler may sum in any order, as a matrix product does. NaN and infinity keep their meaning.
compiled = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"})


@compiled
def _scores(q, k, visible, end, scale, at, scores):  # type: ignore[no-untyped-def]
    """Multiply q [B, H, M, D] by k [B, H, N, D] into scores [B, H, M, at + W]; -inf where a beam does not see a column."""
    rows, heads, queries, size = q.shape
    beams, width = visible.shape[1], scores.shape[3] - at
    hidden = np.float32(-np.inf)
    for b in range(rows):
        shared = 0  # number of first columns (above all the row's suffix) that all beams see; they need no test below
        while shared < end[b] and visible[b, :, shared].all():
            shared += 1
        for h in range(heads):
            for w in range(end[b]):
                for m in range(queries):
                    if w < shared or visible[b, m % beams, w]:
                        total = np.float32(0)
                        for d in range(size):
                            total += q[b, h, m, d] * k[b, h, w, d]
                        scores[b, h, m, at + w] = total * scale
                    else:
                        scores[b, h, m, at + w] = hidden
            for m in range(queries):
                for w in range(end[b], width):
                    scores[b, h, m, at + w] = hidden


@compiled
def _weighted(weights, at, v, end, out):  # type: ignore[no-untyped-def]
    """Multiply weights [B, H, M, at + W] by v [B, H, N, D], and add the product to out [B, H, M, D]."""
    rows, heads, queries, size = out.shape
    for b in range(rows):
        whole = end[b] // 4 * 4
        for h in range(heads):
            for w in range(0, whole, 4):  # four columns per pass over the sums need a quarter of the loads and stores
                for m in range(queries):
                    w0, w1 = weights[b, h, m, at + w], weights[b, h, m, at + w + 1]
                    w2, w3 = weights[b, h, m, at + w + 2], weights[b, h, m, at + w + 3]
                    for d in range(size):
                        out[b, h, m, d] += (
                            w0 * v[b, h, w, d]
                            + w1 * v[b, h, w + 1, d]
                            + w2 * v[b, h, w + 2, d]
                            + w3 * v[b, h, w + 3, d]
                        )
            for w in range(whole, end[b]):
                for m in range(queries):
                    for d in range(size):
                        out[b, h, m, d] += weights[b, h, m, at + w] * v[b, h, w, d]


@compiled
def _write(key, value, column, keys, values):  # type: ignore[no-untyped-def]
    """Copy key and value [B, K, H, D] into the columns [B, K] of keys and values [B, H, N, D]."""
    rows, beams, heads, size = key.shape
    for b in range(rows):
        for beam in range(beams):
            n = column[b, beam]
            for h in range(heads):
                for d in range(size):
                    keys[b, h, n, d] = key[b, beam, h, d]
                    values[b, h, n, d] = value[b, beam, h, d]


def write_columns_numba(
    key_BKHD: Tensor, value_BKHD: Tensor, column_BK: Tensor, keys_BHND: Tensor, values_BHND: Tensor
) -> None:
    """As cache.write_columns."""
    _write(*(t.numpy() for t in (key_BKHD, value_BKHD, column_BK, keys_BHND, values_BHND)))


def decode_attention_numba(
    q_BHGKD: Tensor,
    prefix_k_HPD: Tensor,
    prefix_v_HPD: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    visible_BKN: Tensor,
    end_B: Tensor,
) -> Tensor:
    """Attend from K beams of each row to the shared prefix and to the row's columns before its end. Returns [B, H, G, K, D].

    `k_BHND`, `v_BHND` and `visible_BKN` are whole cache tensors, contiguous. Their first B rows are read.
    """
    b, h, g, k, d = q_BHGKD.shape
    p, m = prefix_k_HPD.shape[1], g * k
    q = q_BHGKD.reshape(b, h, m, d).contiguous()
    scores = torch.empty(b, h, m, p + int(end_B.max()), dtype=q.dtype)
    if p:
        scores[..., :p] = by_head(q * d**-0.5, prefix_k_HPD.transpose(1, 2))
    end = end_B.numpy()
    _scores(q.numpy(), k_BHND.numpy(), visible_BKN.numpy(), end, np.float32(d**-0.5), p, scores.numpy())
    weights = scores.softmax(dim=-1)
    out = by_head(weights[..., :p], prefix_v_HPD) if p else torch.zeros_like(q)
    _weighted(weights.numpy(), p, v_BHND.numpy(), end, out.numpy())
    return out.view(b, h, g, k, d)
