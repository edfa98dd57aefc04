"""The file of figures that `capsfusion evaluate` writes and the report page shows. Knows no model and no metric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from capsfusion_ray.errors import ConfigError

FIGURES = "figures.json"
_KEYS = ("rows", "measured", "system", "figures")  # as training.evaluate.evaluate returns them


def write_figures(folder: Path, result: dict[str, Any]) -> None:
    """Write the result of an evaluation into a folder that exists."""
    (folder / FIGURES).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def read_figures(folder: Path) -> dict[str, Any]:
    """Read the result of an evaluation. Raises ConfigError for a folder without a readable file of figures."""
    try:
        written: dict[str, Any] = json.loads((folder / FIGURES).read_text("utf-8"))
        return {key: written[key] for key in _KEYS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"evaluation={folder}: it holds no readable {FIGURES} of `capsfusion evaluate` ({error!r}); give the "
            "output.path of that job"
        ) from error
