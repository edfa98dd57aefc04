"""The forward pass of Llama in two forms: the prefill of suffixes, and one decode step of all beams. Knows no search."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from capsfusion_ray.config.extras import install_hint
from capsfusion_ray.engines.beam.cache import Cache, Prefix, write_columns
from capsfusion_ray.engines.beam.kernels.attention import decode_attention, prefill_attention
from capsfusion_ray.engines.beam.kernels.elementwise import rms_norm, rotate
from capsfusion_ray.engines.beam.kernels.linear_onednn import has_onednn, linear_onednn
from capsfusion_ray.engines.beam.weights import Layer, Weights
from capsfusion_ray.errors import ConfigError

log = logging.getLogger(__name__)

# Rows per product of the plain torch attention. With more rows each row is padded to a longer one; with fewer rows there
# are more products to launch.
ROWS_TOGETHER = {"cpu": 16, "cuda": 64}


class Network:
    """Runs the weights of a model. One thread calls its methods, in torch's inference mode.

    `attention` is engine.attention. Raises ConfigError for a kernel that is asked for and cannot run here.
    """

    def __init__(self, weights: Weights, attention: str) -> None:
        self.weights = weights
        self._kernels = _kernels(attention, weights)
        # A kernel reads only the columns that a row uses. Plain torch reads as many as the longest row of a product uses.
        self.rows_together = sys.maxsize if self._kernels.attend else ROWS_TOGETHER[weights.device.type]

    def prefix(self, ids: tuple[int, ...]) -> Prefix:
        """Compute the keys and values of a constant prefix."""
        w = self.weights
        empty = [torch.empty(w.kv_heads, 0, w.head_size, dtype=w.dtype, device=w.device) for _ in w.layers]
        nothing = Prefix((), empty, empty)
        if not ids:
            return nothing
        tokens = torch.tensor([ids], device=w.device)
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def keep(_: int, key_RHSD: Tensor, value_RHSD: Tensor) -> None:
            keys.append(key_RHSD[0].contiguous())
            values.append(value_RHSD[0].contiguous())

        self._suffixes(nothing, tokens, torch.tensor([len(ids)], device=w.device), keep)
        return Prefix(ids, keys, values)

    def prefill(self, cache: Cache, prefix: Prefix, rows: Tensor, tokens_RS: Tensor, lengths_R: Tensor) -> Tensor:
        """Write right-padded suffixes into rows of the cache. Returns the logits of their next token, [R, V]."""
        longest = tokens_RS.shape[1]

        def keep(layer: int, key_RHSD: Tensor, value_RHSD: Tensor) -> None:
            cache.keys[layer][rows, :, :longest] = key_RHSD
            cache.values[layer][rows, :, :longest] = value_RHSD

        hidden_RE = self._suffixes(prefix, tokens_RS, lengths_R, keep)
        cache.open_rows(rows, lengths_R)
        return self._kernels.linear(self._norm(hidden_RE, self.weights.norm), self.weights.head)

    def decode(self, cache: Cache, prefix: Prefix, tokens_BK: Tensor, steps_B: Tensor, ends: Sequence[int]) -> Tensor:
        """Feed each beam of rows 0..B-1 its last token. Returns the logits of the next token, [B, K, V].

        `steps_B` is the index of that last token among the generated ones. `ends` is an upper bound of the columns that
        each of these rows uses, with the columns written in this step.
        """
        w = self.weights
        b, k = tokens_BK.shape
        write_BK = cache.claim(b, max(ends))
        attend = self._attend(cache, prefix, ends)
        position_B = len(prefix.ids) + cache.suffix_B[:b] + steps_B
        position_T = position_B.repeat_interleave(k)
        cos, sin = w.cos[position_T], w.sin[position_T]
        x = w.embedding[tokens_BK]
        for i, layer in enumerate(w.layers):
            q, key, value = self._qkv(layer, x, cos, sin)  # [B, K, H*G, D] and [B, K, H, D]
            self._kernels.write(key, value, write_BK, cache.keys[i], cache.values[i])
            attended = attend(i, q.view(b, k, w.kv_heads, w.group, w.head_size).permute(0, 2, 3, 1, 4))
            x = self._rest(layer, x, attended.permute(0, 3, 1, 2, 4).reshape(b, k, -1))
        return self._kernels.linear(self._norm(x, w.norm), w.head)

    def _attend(self, cache: Cache, prefix: Prefix, ends: Sequence[int]) -> Callable[[int, Tensor], Tensor]:
        """Return this step's attention: a function of a layer's index and its queries [B, H, G, K, D], of the same shape."""
        kernel = self._kernels.attend
        if kernel is not None:
            end_B = cache.ends(len(ends), max(ends))
            return lambda i, q: kernel(
                q, prefix.keys[i], prefix.values[i], cache.keys[i], cache.values[i], cache.visible_BKN, end_B
            )
        parts: list[tuple[slice, int, Tensor]] = []  # rows, number of columns, mask that is added to their scores
        for first in range(0, len(ends), self.rows_together):
            rows = slice(first, min(first + self.rows_together, len(ends)))
            width = max(ends[rows])
            visible = cache.visible_BKN[rows, :, :width]
            mask = torch.zeros(visible.shape, dtype=self.weights.dtype, device=visible.device)
            parts.append((rows, width, mask.masked_fill_(~visible, float("-inf"))))

        def attend(i: int, q: Tensor) -> Tensor:
            k, v = cache.keys[i], cache.values[i]
            return torch.cat(
                [
                    decode_attention(
                        q[rows], prefix.keys[i], prefix.values[i], k[rows, :, :width], v[rows, :, :width], mask
                    )
                    for rows, width, mask in parts
                ]
            )

        return attend

    def _suffixes(
        self, prefix: Prefix, tokens_RS: Tensor, lengths_R: Tensor, keep: Callable[[int, Tensor, Tensor], None]
    ) -> Tensor:
        """Run right-padded suffixes through all layers. Returns the hidden state of each one's last token, [R, E].

        Each layer hands its keys and values to `keep` at once. They are views of products 2.5 times their size, so to
        hold those of all layers would take 16 GB in the prefill of a 13B model.
        """
        w = self.weights
        r, s = tokens_RS.shape
        p = len(prefix.ids)
        mask_SC = torch.ones(s, p + s, dtype=torch.bool, device=w.device).tril(
            p
        )  # padding is on the right, where no token sees it
        cos, sin = w.cos[p : p + s].repeat(r, 1), w.sin[p : p + s].repeat(r, 1)
        x = w.embedding[tokens_RS]
        for i, layer in enumerate(w.layers):
            q, key, value = self._qkv(layer, x, cos, sin)
            key, value = key.transpose(1, 2), value.transpose(1, 2)
            keep(i, key, value)
            q_RHGSD = q.view(r, s, w.kv_heads, w.group, w.head_size).permute(0, 2, 3, 1, 4)
            attended = prefill_attention(q_RHGSD, prefix.keys[i], prefix.values[i], key, value, mask_SC)
            attended = attended.permute(0, 3, 1, 2, 4).reshape(r, s, -1)
            if layer is w.layers[-1]:  # after the last attention only the last token's state is needed
                last = torch.arange(r, device=w.device), lengths_R - 1
                x, attended = x[last], attended[last]
            x = self._rest(layer, x, attended)
        return x

    def _qkv(self, layer: Layer, x: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries [.., H*G, D], rotated keys [.., H, D] and values [.., H, D].

        `cos_TD` and `sin_TD` are the angles of each token of `x`.
        """
        w = self.weights
        n_q, n_qk = w.kv_heads * w.group, w.kv_heads * (w.group + 1)
        qkv = self._kernels.linear(self._norm(x, layer.attention_norm), layer.qkv, layer.qkv_bias)
        heads_THD = qkv.view(len(cos_TD), -1, w.head_size)
        qk = self._kernels.rotate(heads_THD[:, :n_qk], cos_TD, sin_TD)
        query, key, value = (t.unflatten(0, x.shape[:-1]) for t in (qk[:, :n_q], qk[:, n_q:], heads_THD[:, n_qk:]))
        return query, key, value

    def _rest(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        """Run what follows the attention in a layer: output projection and MLP, with their residual sums."""
        linear = self._kernels.linear
        x = x + linear(attended, layer.out, layer.out_bias)
        gate, up = linear(self._norm(x, layer.mlp_norm), layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
        return x + linear(F.silu(gate) * up, layer.down, layer.down_bias)

    def _norm(self, x: Tensor, weight_E: Tensor) -> Tensor:
        return self._kernels.norm(x, weight_E, self.weights.norm_eps)


Attend = Callable[..., Tensor]
Write = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
Norm = Callable[[Tensor, Tensor, float], Tensor]
Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]
Linear = Callable[..., Tensor]  # as F.linear, of x, weight and an optional bias


class Kernels(NamedTuple):
    """The operations of a layer that may have a kernel. The default of each is plain torch."""

    attend: Attend | None = None  # None: `decode_attention` for ROWS_TOGETHER rows at a time
    write: Write = write_columns
    norm: Norm = rms_norm
    rotate: Rotate = rotate
    linear: Linear = F.linear


def _kernels(asked: str, weights: Weights) -> Kernels:
    """Choose the kernels that engine.attention asks for; "auto" chooses those for the device."""
    cuda = weights.device.type == "cuda"
    kind = {"auto": "triton" if cuda else "numba"}.get(asked, asked)
    problem = {"torch": lambda _: "", "triton": _no_triton, "numba": _no_numba}[kind](weights)
    if problem and asked != "auto":
        raise ConfigError(f"engine.attention={asked!r}: {problem}; use engine.attention=auto or torch")
    if problem and cuda:
        log.warning("engine.attention=auto: %s, so the decode attention runs in plain torch, which is slower", problem)
    if kind == "triton" and not problem:
        from capsfusion_ray.engines.beam.kernels.attention_triton import decode_attention_triton  # imports triton

        return Kernels(decode_attention_triton)
    if kind == "numba":
        products = linear_onednn if _float32_on_cpu(weights) and has_onednn() else F.linear
        if problem:
            return Kernels(linear=products)
        from capsfusion_ray.engines.beam.kernels.attention_numba import decode_attention_numba, write_columns_numba
        from capsfusion_ray.engines.beam.kernels.elementwise_numba import rms_norm_numba, rotate_numba

        return Kernels(decode_attention_numba, write_columns_numba, rms_norm_numba, rotate_numba, products)
    return Kernels()


def _no_triton(weights: Weights) -> str:
    """Return why the Triton kernel cannot run here, or "" if it can."""
    if weights.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no GPU in this process"
    if find_spec("triton") is None:
        return "triton is not installed"
    if weights.head_size < 16 or weights.head_size & (weights.head_size - 1):
        return f"the model's heads have {weights.head_size} channels; triton needs a power of 2 that is at least 16"
    return ""


def _no_numba(weights: Weights) -> str:
    """Return why the numba kernel cannot run here, or "" if it can."""
    if not _float32_on_cpu(weights):
        return f"numba computes in float32 on a CPU, and this model is in {weights.dtype} on {weights.device.type}"
    return "" if find_spec("numba") else f"numba is not installed ({install_hint('cpu')})"


def _float32_on_cpu(weights: Weights) -> bool:
    return bool(weights.device.type == "cpu" and weights.dtype == torch.float32)
