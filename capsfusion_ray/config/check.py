"""Refuse a bad value of a key, in one form of message."""

from __future__ import annotations

from capsfusion_ray.errors import ConfigError


def check(ok: bool, key: str, value: object, want: str) -> None:
    """Raises ConfigError unless `ok`; `want` says what the value must be."""
    if not ok:
        raise ConfigError(f"{key}={value!r}: must be {want}")
