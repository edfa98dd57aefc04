"""What a caller of the API gives -> one typed config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any, TypeVar

from capsfusion_ray.config import parse_config

T = TypeVar("T")
Place = str | PathLike[str]
OneConfig = Place | Mapping[str, Any]
# A mapping with dotted or nested keys, the path of a YAML file, a word `key=value`, or several of these.
Config = OneConfig | Sequence[OneConfig] | None


def parsed(schema: type[T], config: Config, given: Mapping[str, Any]) -> T:
    """`config`, and over it the arguments in `given`: dotted key -> value, None where the caller gave none.

    Raises ConfigError for an unknown key or a value of the wrong type.
    """
    parts: Sequence[OneConfig]
    if config is None:
        parts = []
    elif isinstance(config, str | PathLike | Mapping):
        parts = [config]
    else:
        parts = config
    words = [part if isinstance(part, Mapping) else fspath(part) for part in parts]
    return parse_config(schema, [*words, {key: _plain(value) for key, value in given.items() if value is not None}])


def _plain(value: Any) -> Any:
    """Paths as texts, which is how a config holds them."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return fspath(value) if isinstance(value, PathLike) else value
