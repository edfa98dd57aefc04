"""The engine protocol and the one table of engines. Knows no Ray, and imports no engine until it is chosen."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.core.types import Generation, Prompt

ENGINES = {
    "beam": "capsfusion_ray.engines.beam.cpu_threads:build",
    "transformers": "capsfusion_ray.engines.hf_engine:TransformersEngine",
    "echo": "capsfusion_ray.engines.echo:EchoEngine",
    "api": "capsfusion_ray.engines.api.engine:ApiEngine",
    "vllm": "capsfusion_ray.engines.vllm_engine:VllmEngine",
}


@dataclass(frozen=True)
class Load:
    """How full an engine is, for those who watch it."""

    busy: int  # captions in work
    room: int  # the most it has in work together
    kv_share: float = 0.0  # of the KV cache's columns, how many hold a token; 0 where there is no such cache


class Engine(Protocol):
    """Writes captions for prompts; driven by one thread; no method blocks longer than a few decode steps or one batch.

    Construction loads the model once: `Engine(engine_config, decode_config)`. It raises ConfigError for a model it
    cannot run and EngineError for one that is damaged.
    """

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens (BOS) as the model's tokenizer adds them. [] per text without one."""

    def submit(self, prompts: Sequence[Prompt]) -> None:
        """Queue prompts. Ids must be unique among the unfinished ones."""

    def step(self) -> list[Generation]:
        """Advance; the generations that finished, in any order, each with its prompt's id.

        A row's own failure comes back as a Generation with finish=ERROR. Raises EngineError when the engine is dead.
        """

    @property
    def unfinished(self) -> int:
        """Prompts submitted whose generation has not come back yet."""

    @property
    def load(self) -> Load:
        """How full the engine is now; cheap."""


def prompt_fault(prompt: Prompt, most_tokens: int) -> str:
    """Why an engine that takes at most that many prompt tokens cannot take this one; empty where it can."""
    if 0 < prompt.tokens <= most_tokens:
        return ""
    return f"{prompt.tokens} prompt tokens; needs 1 to engine.max_prompt_tokens={most_tokens}"


def device_name(engine: EngineConfig) -> str:
    """What the engine computes on, as a unit's summary notes it: a GPU's name, "cpu", a server's model, or "none"."""
    if not engine.loads_model:
        return engine.api.model if engine.kind == "api" else "none"
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() and engine.device != "cpu" else "cpu"


def build_engine(engine: EngineConfig, decode: DecodeConfig) -> Engine:
    """Import and construct the engine of `engine.kind` (validated when the config was parsed)."""
    module, _, name = ENGINES[engine.kind].partition(":")
    built: Engine = getattr(importlib.import_module(module), name)(engine, decode)
    return built
