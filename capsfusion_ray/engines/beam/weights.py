"""What a Llama-shaped checkpoint becomes: fused matrices and RoPE tables. Refuses by name what the network cannot run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from capsfusion_ray.engines.loading import LoadedModel
from capsfusion_ray.errors import ConfigError

# The decoder layers of these differ from each other only in their biases (transformers 5.x). SmolLM and SmolLM2 are Llama.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


@dataclass(frozen=True)
class Layer:
    """One decoder layer; matrices as nn.Linear stores them, [out, in]. A bias is None where the model has none."""

    attention_norm: Tensor
    qkv: Tensor  # [(H*G + 2*H) * D, hidden]: queries, keys, values
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor  # [2 * intermediate, hidden]
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True)
class Weights:
    """A whole model on its device."""

    layers: list[Layer]
    embedding: Tensor  # [V, hidden]
    norm: Tensor
    head: Tensor  # [V, hidden]; the embedding itself where they are tied
    cos: Tensor  # [positions, D], in the model's dtype and scaled as HF's rotary module gives it
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
    """Take a model's weights over, layer by layer: the model is emptied on the way, so that memory holds them once.

    `max_tokens` is the longest prompt plus output. Raises ConfigError for a model this network would not reproduce.
    """
    model: Any = loaded.model
    config = model.config
    check_supported(loaded, max_tokens)
    inner = model.model
    positions = torch.arange(max_tokens, device=loaded.device)[None]
    # HF's own module gives the tables, so every RoPE variant is scaled as HF scales it.
    cos, sin = inner.rotary_emb(inner.embed_tokens.weight, positions)
    layers = []
    for layer in inner.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv, qkv_bias = _stack(attention.q_proj, attention.k_proj, attention.v_proj)
        del attention.q_proj, attention.k_proj, attention.v_proj
        gate_up, gate_up_bias = _stack(mlp.gate_proj, mlp.up_proj)
        del mlp.gate_proj, mlp.up_proj
        layers.append(
            Layer(
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
        )
    return Weights(
        layers=layers,
        embedding=inner.embed_tokens.weight.data,
        norm=inner.norm.weight.data,
        head=model.lm_head.weight.data,
        cos=cos[0],
        sin=sin[0],
        norm_eps=config.rms_norm_eps,
        kv_heads=config.num_key_value_heads,
        group=config.num_attention_heads // config.num_key_value_heads,
        head_size=attention.head_dim,
    )


def check_supported(loaded: LoadedModel, max_tokens: int) -> None:
    """Raises ConfigError that names the model, what is not supported, and the way out."""
    config = loaded.model.config
    generation = loaded.model.generation_config

    def refuse(what: str) -> None:
        raise ConfigError(
            f"engine.model={loaded.name!r}: engine.kind=beam does not support {what}; use engine.kind=transformers for this model"
        )

    architecture = type(loaded.model).__name__
    if architecture not in ARCHITECTURES:
        refuse(f"the architecture {architecture} (it runs {', '.join(ARCHITECTURES)})")
    if config.hidden_act not in ("silu", "swish"):
        refuse(f"hidden_act={config.hidden_act!r}")
    if getattr(config, "quantization_config", None) is not None:
        refuse("quantised weights")
    layer_types = getattr(config, "layer_types", None) or ()
    # Mistral applies its window to every layer; Qwen2 only to the layers it names.
    windowed = architecture == "MistralForCausalLM" or "sliding_attention" in layer_types
    window = getattr(config, "sliding_window", None)
    if windowed and window is not None and window < max_tokens:
        refuse(
            f"a sliding window of {window} tokens, shorter than engine.max_prompt_tokens + decode.max_new_tokens = {max_tokens}"
        )
    rope = config.rope_parameters
    limits = {
        "dynamic": config.max_position_embeddings,
        "longrope": rope.get("original_max_position_embeddings", config.max_position_embeddings),
    }
    limit = limits.get(rope["rope_type"])
    if limit is not None and max_tokens > limit:
        refuse(f"rope_type={rope['rope_type']!r} beyond {limit} tokens, where its frequencies depend on the length")
    # What HF's generate would take from the model folder and this search does not do.
    for key, neutral in {
        "repetition_penalty": (None, 1.0),
        "early_stopping": (None, False),
        "bad_words_ids": (None, []),
        "suppress_tokens": (None, []),
        "min_length": (None, 0),
        "min_new_tokens": (None, 0),
        "forced_eos_token_id": (None,),
        "num_beam_groups": (None, 1),
        "no_repeat_ngram_size": (None, 0),
        "encoder_no_repeat_ngram_size": (None, 0),
        "encoder_repetition_penalty": (None, 1.0),
        "begin_suppress_tokens": (None, []),
        "sequence_bias": (None, []),
        "exponential_decay_length_penalty": (None,),
    }.items():
        value = getattr(generation, key, None)
        if value not in neutral:
            refuse(f"{key}={value!r} of its generation_config.json")


def _stack(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Several projections of the same input as one."""
    weight = torch.cat([linear.weight.data for linear in linears])
    if linears[0].bias is None:
        return weight, None
    return weight, torch.cat([linear.bias.data for linear in linears])


def _bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.data
