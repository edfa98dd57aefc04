"""Save the state of a training run to one file, and restore it, so that a killed run continues exactly."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from capsfusion_ray.engines.loading import one_line
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.training.optim import Average


def save_checkpoint(
    path: Path, step: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], average: Average
) -> None:
    """Write the state after `step` steps: weights, optimizers, averaged weights and random generators.

    A process that is killed here leaves the old checkpoint or the new one, never half of one.
    """
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "average": average.values,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    half_written = path.with_suffix(".tmp")
    torch.save(state, half_written)
    os.replace(half_written, path)


def load_checkpoint(path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], average: Average) -> int:
    """Restore the state of a checkpoint. Returns the number of steps done: 0 where there is no checkpoint.

    Raises ConfigError for a file that is no readable checkpoint.
    """
    if not path.exists():
        return 0
    state = _read(path)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    for mine, saved in zip(average.values, state["average"], strict=True):
        mine.copy_(saved)
    torch.set_rng_state(state["rng"])
    if state.get("cuda_rng") is not None and torch.cuda.is_available():  # older checkpoints have no such state
        torch.cuda.set_rng_state(state["cuda_rng"])
    return int(state["step"])


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    except Exception as error:  # the class depends on which part is damaged, or is no tensor
        raise ConfigError(
            f"{path}: this checkpoint cannot be read ({one_line(error)}); remove it, and the training starts from step 0"
        ) from error
