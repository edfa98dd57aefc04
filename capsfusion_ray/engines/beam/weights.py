"""The weights of a model as the network needs them: joined matrices, and the tables of the rotary embedding (RoPE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from capsfusion_ray.engines.beam.architectures import check_supported
from capsfusion_ray.engines.loading import LoadedModel


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Matrices are stored as in nn.Linear, [out, in]. A bias is None where the model has none."""

    attention_norm: Tensor
    qkv: Tensor  # [(H*G + 2*H) * D, E]: queries, keys, values
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor  # [2 * intermediate, E]
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True)
class Weights:
    """A whole model on its device."""

    layers: list[Layer]
    embedding: Tensor  # [V, E]
    norm: Tensor
    head: Tensor  # [V, E]; the embedding itself where the model ties them
    cos: Tensor  # [positions, D], in the model's dtype and scaled as HF's rotary module scales it
    sin: Tensor
    norm_eps: float
    kv_heads: int
    group: int  # query heads per key/value head
    head_size: int

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype


def take_weights(loaded: LoadedModel, max_tokens: int) -> Weights:
    """Move the weights out of the model, layer by layer, so that memory never holds them twice. The model is unusable then.

    `max_tokens` is the length of the longest prompt plus its caption. Raises ConfigError for a model that the network
    would not reproduce.
    """
    check_supported(loaded, max_tokens)
    model: Any = loaded.model
    config, inner = model.config, model.model
    positions = torch.arange(max_tokens, device=loaded.device)[None]
    # HF's own module computes the tables, so each variant of RoPE is scaled as HF scales it.
    cos, sin = inner.rotary_emb(inner.embed_tokens.weight, positions)
    return Weights(
        layers=[_take_layer(layer) for layer in inner.layers],
        embedding=inner.embed_tokens.weight.data,
        norm=inner.norm.weight.data,
        head=model.lm_head.weight.data,
        cos=cos[0],
        sin=sin[0],
        norm_eps=config.rms_norm_eps,
        kv_heads=config.num_key_value_heads,
        group=config.num_attention_heads // config.num_key_value_heads,
        head_size=inner.layers[-1].self_attn.head_dim,
    )


def _take_layer(layer: Any) -> Layer:
    """Join the projections of one decoder layer, and delete the originals from the model."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = _join(attention.q_proj, attention.k_proj, attention.v_proj)
    del attention.q_proj, attention.k_proj, attention.v_proj
    gate_up, gate_up_bias = _join(mlp.gate_proj, mlp.up_proj)
    del mlp.gate_proj, mlp.up_proj
    return Layer(
        attention_norm=layer.input_layernorm.weight.data,
        qkv=qkv,
        qkv_bias=qkv_bias,
        out=attention.o_proj.weight.data,
        out_bias=_bias(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight.data,
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=mlp.down_proj.weight.data,
        down_bias=_bias(mlp.down_proj),
    )


def _join(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Return several projections of the same input as one matrix and one bias."""
    weight = torch.cat([linear.weight.data for linear in linears])
    if linears[0].bias is None:
        return weight, None
    return weight, torch.cat([linear.bias.data for linear in linears])


def _bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.data
