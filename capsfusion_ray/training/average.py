"""Average the weights of models that were trained from the same start: a model soup (Wortsman et al., 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capsfusion_ray.config import section, setting
from capsfusion_ray.engines.loading import load_to_train
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.models.fusion_file import FUSION_FILE


@dataclass(frozen=True)
class AverageOutputConfig:
    """Where the model folder is written."""

    path: str = setting("", "a new folder", common=True)


@dataclass(frozen=True)
class AverageConfig:
    """capsfusion average"""

    models: list[str] = setting(
        [], "model folders; the tokenizer and configs are those of the first", common=True, required=True
    )
    shares: list[float] = setting([], "weight of each model in the average, sum 1; empty: equal weights", common=True)
    output: AverageOutputConfig = section(AverageOutputConfig, required=["path"])


def average(cfg: AverageConfig) -> dict[str, Any]:
    """Write the model folder: averaged weights in bfloat16, all else as in the first model. Returns {model, shares}.

    Raises ConfigError for shares whose sum is not 1, for a folder that is no model, and for models that do not match.
    """
    shares = _shares(cfg)
    if not cfg.output.path or Path(cfg.output.path).resolve() in {Path(model).resolve() for model in cfg.models}:
        raise ConfigError(f"output.path={cfg.output.path}: give a folder for the average that is none of the models")
    tokenizer, first = _load(cfg.models[0])
    vocabulary = tokenizer.get_vocab()
    mixed = {name: shares[0] * weights for name, weights in _weights(first).items()}
    for path, share in zip(cfg.models[1:], shares[1:], strict=True):
        other, model = _load(path)
        weights = _weights(model)
        shapes = [{name: w.shape for name, w in tensors.items()} for tensors in (weights, mixed)]
        if other.get_vocab() != vocabulary or shapes[0] != shapes[1]:
            raise ConfigError(
                f"models: {path} and {cfg.models[0]} differ in layers or vocabulary; give models that were trained from the same start"
            )
        for name, total in mixed.items():
            total += share * weights[name]
    first.load_state_dict(mixed)
    folder = Path(cfg.output.path)
    first.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    wish = Path(cfg.models[0]) / FUSION_FILE
    if wish.is_file():
        (folder / FUSION_FILE).write_bytes(wish.read_bytes())
    return {"model": cfg.output.path, "shares": dict(zip(cfg.models, shares, strict=True))}


def _shares(cfg: AverageConfig) -> list[float]:
    if len(cfg.models) < 2:
        raise ConfigError(
            f"models={cfg.models}: an average needs at least two model folders; give models=[out/a,out/b]"
        )
    shares = cfg.shares or [1 / len(cfg.models)] * len(cfg.models)
    if len(shares) != len(cfg.models) or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise ConfigError(f"shares={cfg.shares}: give one share per model ({len(cfg.models)}) with a sum of 1, or none")
    return shares


def _load(path: str) -> tuple[Any, Any]:
    """Return the tokenizer, and the model in float32."""
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(f"models: {path} is no model folder; give the output.path of a `capsfusion train`")
    return load_to_train(path)


def _weights(model: Any) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = model.state_dict()
    return weights
