"""A config as plain values: to save it with an output, and to fingerprint what decides the output."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from omegaconf import OmegaConf

from capsfusion_ray.config.secrets import in_storage, is_secret


def as_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as nested dicts, with *** for secrets of storage options."""

    def masked(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {k: masked(v, f"{name}.{k}") for k, v in value.items()}
        secret = in_storage(name) and is_secret(name.rpartition(".")[2])
        return "***" if secret and value else value

    return {k: masked(v, k) for k, v in dataclasses.asdict(config).items()}


def to_yaml(config: Any) -> str:
    """The config as it is saved with the output, with *** for secrets."""
    return OmegaConf.to_yaml(OmegaConf.create(as_dict(config)))


def fingerprint(parts: dict[str, Any]) -> str:
    """16 hex digits of JSON-able values; the order of their keys does not matter."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
