"""A config as plain values: to save it with an output, and to fingerprint what decides the output."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from omegaconf import OmegaConf

from capsfusion_ray.config.secrets import in_storage, is_secret
from capsfusion_ray.errors import ConfigError


def as_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as nested dicts, with *** for secrets of storage options."""

    def masked(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {k: masked(v, f"{name}.{k}") for k, v in value.items()}
        secret = in_storage(name) and is_secret(name.rpartition(".")[2])
        return "***" if secret and value else value

    return {k: masked(v, k) for k, v in dataclasses.asdict(config).items()}


def read_saved(text: str) -> dict[str, Any]:
    """A config that to_yaml saved, as plain values: text stays text, so `${oc.env:…}` in another's output names no secret of ours.

    Raises ConfigError for what is no YAML mapping.
    """
    try:
        saved = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except Exception as error:  # YAML's own exceptions
        raise ConfigError(f"a saved config is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(saved, dict):
        raise ConfigError("a saved config is not a YAML mapping")
    return {str(key): value for key, value in saved.items()}


def to_yaml(config: Any) -> str:
    """The config as it is saved with the output, with *** for secrets."""
    return OmegaConf.to_yaml(OmegaConf.create(as_dict(config)))


def fingerprint(parts: dict[str, Any]) -> str:
    """16 hex digits of JSON-able values; the order of their keys does not matter."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
