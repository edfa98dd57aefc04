"""The protocol of all engines, and the table from which `engine.kind` chooses one. Knows no Ray.

To add an engine, write a class that has the methods of `Engine` and add one line to `ENGINES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.core.types import Generation, Prompt

# engine.kind -> module:callable. The module is imported only when its engine is chosen.
ENGINES = {
    "beam": "capsfusion_ray.engines.beam.cpu_threads:build",
    "transformers": "capsfusion_ray.engines.hf_engine:TransformersEngine",
    "echo": "capsfusion_ray.engines.echo:EchoEngine",
    "api": "capsfusion_ray.engines.api.engine:ApiEngine",
    "vllm": "capsfusion_ray.engines.vllm_engine:VllmEngine",
}


@dataclass(frozen=True)
class Occupancy:
    """How full an engine is at one moment. Metrics and the calibration read it."""

    busy: int  # captions that the engine is decoding now
    capacity: int  # the largest number of captions that it decodes together
    kv_share: float = (
        0.0  # share of the columns of the KV cache that hold a token; 0 for an engine without such a cache
    )


class Engine(Protocol):
    """Writes captions for prompts. One thread drives it. No method blocks longer than a few decode steps or one batch.

    The constructor, `Engine(engine_config, decode_config)`, loads the model once. It raises ConfigError for a model that
    the engine cannot run, and EngineError for a damaged model.
    """

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, with the special tokens (BOS) that the model's tokenizer adds.

        An engine without a tokenizer returns [] for each text. Other threads than the one that steps may call this.
        """

    def submit(self, prompts: Sequence[Prompt]) -> None:
        """Queue prompts. The id of a prompt must differ from the ids of all unfinished ones."""

    def step(self) -> list[Generation]:
        """Advance, and return the generations that finished, in any order. Each carries the id of its prompt.

        When a single row fails, its Generation has finish=ERROR. Raises EngineError when the whole engine is dead.
        """

    @property
    def unfinished(self) -> int:
        """The number of submitted prompts whose generation `step` has not returned yet."""

    @property
    def occupancy(self) -> Occupancy:
        """How full the engine is now. This must be cheap."""


def prompt_fault(prompt: Prompt, max_tokens: int) -> str:
    """Return why an engine that takes 1 to `max_tokens` prompt tokens refuses this prompt, or "" if it takes it."""
    if 0 < prompt.tokens <= max_tokens:
        return ""
    return f"the prompt has {prompt.tokens} tokens; it must have 1 to engine.max_prompt_tokens={max_tokens}"


def device_name(engine: EngineConfig) -> str:
    """Return what the engine computes on, for the summary of a unit: the name of a GPU, "cpu", the model of a server, or "none"."""
    if not engine.loads_model:
        return engine.api.model if engine.kind == "api" else "none"
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() and engine.device != "cpu" else "cpu"


def count_gpus(engine: EngineConfig) -> int:
    """GPUs of this machine that torch sees; 0 for an engine that uses none, without importing torch."""
    if not engine.loads_model or engine.device == "cpu":
        return 0
    import torch

    return int(torch.cuda.device_count())


def build_engine(engine: EngineConfig, decode: DecodeConfig) -> Engine:
    """Import and construct the engine of `engine.kind`, which the config has checked. Raises what `Engine` says."""
    module, _, name = ENGINES[engine.kind].partition(":")
    built: Engine = getattr(importlib.import_module(module), name)(engine, decode)
    return built
