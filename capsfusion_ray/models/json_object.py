"""Parse the small JSON files of a model folder, which a stranger may have written."""

from __future__ import annotations

import json
from typing import Any

from capsfusion_ray.errors import ConfigError


def parse_json_object(path: str, data: bytes) -> dict[str, Any]:
    """The object in `data`; `path` names the file in errors. Raises ConfigError for anything but a JSON object."""
    try:
        value = json.loads(data.decode(), parse_constant=_refuse_nan)
    except RecursionError:
        raise ConfigError(f"{path}: objects or lists are nested too deeply; fetch the model again") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); mend or remove it") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold a JSON object, and holds a {type(value).__name__}; mend or remove it")
    return value


def _refuse_nan(name: str) -> float:
    if name == "NaN":  # infinities are allowed: the time_step_limit of Mamba has one
        raise ValueError("it holds NaN")
    return float(name)
