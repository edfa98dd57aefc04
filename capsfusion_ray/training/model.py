"""The model that is trained: built or loaded at the start, and saved as a standard model folder at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from capsfusion_ray.core import prompt
from capsfusion_ray.engines.loading import load_to_train
from capsfusion_ray.models.fusion_file import DECODE_KEYS, FUSION_FILE, read_fusion_file
from capsfusion_ray.storage import Store
from capsfusion_ray.training.batches import Encoder, PieceEncoder, TextEncoder, cached_by_word
from capsfusion_ray.training.config import ModelConfig, TrainConfig
from capsfusion_ray.training.tokenizer import SHORT_TEMPLATE, train_tokenizer
from capsfusion_ray.training.triples import Triple


def start_model(cfg: TrainConfig, triples: Sequence[Triple], saved: Path) -> tuple[Any, Any]:
    """Return the tokenizer, and the model with its parameters in float32: loaded from model.path, or new.

    A new tokenizer is trained on `triples` once and kept in the folder `saved`, from which a resumed run reads it.
    Raises ConfigError and EngineError for a model.path that cannot be used.
    """
    if cfg.model.path:
        tokenizer, model = load_to_train(cfg.model.path)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer, model
    if (saved / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(saved)
    else:
        tokenizer = train_tokenizer((s for t in triples for s in (t.raw, t.synthetic, t.fused)), cfg.model.vocab_size)
        tokenizer.save_pretrained(saved)
    return tokenizer, _new_llama(cfg.model, tokenizer)


def _new_llama(cfg: ModelConfig, tokenizer: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=cfg.hidden,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.heads,
        intermediate_size=cfg.ffn,
        max_position_embeddings=cfg.max_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        # Each block starts as the identity. The first steps then train the tied embedding table instead of noise that
        # passes through all layers.
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(p)
    return model


def add_dropout(model: nn.Module, share: float) -> None:
    """Add dropout to the output of each attention and MLP block, by hooks, because the architecture has none."""

    def drop(module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (F.dropout(output[0], share, module.training), *output[1:])
        return F.dropout(output, share, module.training)

    if share > 0:
        for name, module in model.named_modules():
            if name.endswith((".self_attn", ".mlp")):
                module.register_forward_hook(drop)


def template_text(cfg: TrainConfig) -> str:
    """Return the prompt template: the configured one, else that of the model's fusion.json, else the default one.

    The default is the short template for a model from scratch, and the template of the CapsFusion paper for others.
    """
    if cfg.prompt_template or not cfg.model.path:
        return cfg.prompt_template or SHORT_TEMPLATE
    return read_fusion_file(Store(cfg.model.path)).get("prompt_template") or prompt.TEMPLATE


def build_encoder(tokenizer: Any, template: str, source_weight: float, ours: bool) -> Encoder:
    """Return the encoder of triples. `ours` says that the tokenizer is that of tokenizer.py.

    That tokenizer never merges over a space, so the ids of each word can be cached.
    """
    parsed = prompt.Template.parse(template)
    if not ours:
        return TextEncoder(parsed, tokenizer, tokenizer.eos_token_id, source_weight)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return PieceEncoder(
        cached_by_word(encode),
        list(tokenizer(parsed.before_raw)["input_ids"]),
        encode(parsed.between),
        encode(parsed.after_synthetic),
        tokenizer.eos_token_id,
        source_weight,
    )


def save_model(model: Any, tokenizer: Any, cfg: TrainConfig, folder: Path) -> None:
    """Write a standard model folder in bfloat16. Its fusion.json holds the prompt template and the decoding to use."""
    half = type(model)(model.config)
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    wanted = {
        "prompt_template": template_text(cfg),
        "max_prompt_tokens": cfg.output.max_prompt_tokens,
        "decode": {name: value for name in DECODE_KEYS if (value := getattr(cfg.output, name)) is not None},
    }
    (folder / FUSION_FILE).write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
