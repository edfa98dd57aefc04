"""Which models the beam engine runs. A model that it would not reproduce exactly is refused by name.

To add an architecture whose decoder layers are computed as Llama's are (they may have biases), add one line to
`ARCHITECTURES`. tests/engines/beam/test_matches_transformers.py then compares it with HF token by token. An architecture
with further operations in a layer (as the query and key norms of Qwen3) also needs a field in `weights.Layer` and its
computation in `network.Network`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from capsfusion_ray.engines.loading import LoadedModel
from capsfusion_ray.errors import ConfigError


@dataclass(frozen=True)
class Architecture:
    """In what an architecture differs from Llama. Biases need no entry: they are read from the model."""

    window_on_every_layer: bool = False  # sliding_window holds for each layer, whatever config.layer_types says


# By the name of the model's class in transformers 5.x. SmolLM and SmolLM2 are LlamaForCausalLM.
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(),
    "MistralForCausalLM": Architecture(window_on_every_layer=True),
    "Qwen2ForCausalLM": Architecture(),
}

# Settings of generation_config.json that HF's generate obeys and this search does not have, with the values that
# switch them off.
NEUTRAL_GENERATION: dict[str, tuple[Any, ...]] = {
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
}


def check_supported(loaded: LoadedModel, max_tokens: int) -> None:
    """Check that the engine reproduces this model. `max_tokens` is the length of the longest prompt plus its caption.

    Raises ConfigError that names the model, what is not supported, and the way out.
    """
    config = loaded.model.config
    name = type(loaded.model).__name__
    unsupported = (
        _in_layers(name, config)
        or _in_window(ARCHITECTURES[name], config, max_tokens)
        or _in_rope(config, max_tokens)
        or _in_generation(loaded.model.generation_config)
    )
    if unsupported:
        raise ConfigError(
            f"engine.model={loaded.name!r}: engine.kind=beam does not support {unsupported}; use engine.kind=transformers "
            "for this model"
        )


# Each of these returns what is not supported, or "".


def _in_layers(name: str, config: Any) -> str:
    if name not in ARCHITECTURES:
        return f"the architecture {name} (it runs {', '.join(ARCHITECTURES)})"
    if config.hidden_act not in ("silu", "swish"):
        return f"hidden_act={config.hidden_act!r}"
    if getattr(config, "quantization_config", None) is not None:
        return "quantised weights"
    return ""


def _in_window(architecture: Architecture, config: Any, max_tokens: int) -> str:
    layer_types = getattr(config, "layer_types", None) or ()
    windowed = architecture.window_on_every_layer or "sliding_attention" in layer_types
    window = getattr(config, "sliding_window", None)
    if windowed and window is not None and window < max_tokens:
        return f"a sliding window of {window} tokens, shorter than engine.max_prompt_tokens + decode.max_new_tokens = {max_tokens}"
    return ""


def _in_rope(config: Any, max_tokens: int) -> str:
    rope = config.rope_parameters
    limits = {
        "dynamic": config.max_position_embeddings,
        "longrope": rope.get("original_max_position_embeddings", config.max_position_embeddings),
    }
    limit = limits.get(rope["rope_type"])
    if limit is not None and max_tokens > limit:
        return f"rope_type={rope['rope_type']!r} beyond {limit} tokens, where its frequencies depend on the length"
    return ""


def _in_generation(generation: Any) -> str:
    for key, neutral in NEUTRAL_GENERATION.items():
        value = getattr(generation, key, None)
        if value not in neutral:
            return f"{key}={value!r} of its generation_config.json"
    return ""
