"""The middle stage: a unit's rows that wait for a caption -> prompts -> generations -> the same rows with their captions.

Knows no Ray and no store.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.core.prompt import PromptBuilder
from capsfusion_ray.core.types import FinishReason, Generation, Prompt
from capsfusion_ray.core.unit_batch import BUSY_S, DEVICE, ENGINE_S, UnitBatch
from capsfusion_ray.core.unit_steps import waiting_pairs, with_generations
from capsfusion_ray.engines.base import device_name
from capsfusion_ray.errors import RowError
from capsfusion_ray.models.location import locate
from capsfusion_ray.run.engine_loop import (
    TRIAL_PAIR,
    BuildEngine,
    EngineLoop,
    Failure,
    FirstCaptionsCheck,
    Monitor,
    start_engine,
)

# (unit id, prompts) -> the generations by prompt id, and the seconds of the engine's time.
Generate = Callable[[str, list[Prompt]], tuple[dict[str, Generation], float]]


def start_loop(
    engine: EngineConfig,
    decode: DecodeConfig,
    template: str,
    monitor: Monitor | None = None,
    on_failure: Callable[[Failure], None] = lambda failure: None,
    build: BuildEngine | None = None,
) -> tuple[EngineLoop, PromptBuilder]:
    """Load the engine, let it write one caption where it has a model, and start its loop. Raises what any of that raises."""
    built, prompts = start_engine(engine, decode, template, build)
    check = FirstCaptionsCheck(locate(engine.model), decode) if engine.loads_model else None
    loop = EngineLoop(built, engine.stall_s, monitor, check, on_failure)
    trial = prompts.build([TRIAL_PAIR]) if engine.loads_model else []
    loop.start([prompt for prompt in trial if isinstance(prompt, Prompt)])
    return loop, prompts


def start_fuser(
    engine: EngineConfig, decode: DecodeConfig, template: str, build: BuildEngine | None = None
) -> tuple[UnitFuser, EngineLoop]:
    """An engine in this process, and what fuses units with it. Stop the loop at the end. Raises what `start_loop` raises."""
    loop, prompts = start_loop(engine, decode, template, build=build)
    return UnitFuser(engine, prompts, lambda unit_id, written: loop.generate(written)), loop


class UnitFuser:
    """Fuses units; may be called from several threads. `generate` gets a unit's prompts written."""

    def __init__(self, engine: EngineConfig, prompts: PromptBuilder, generate: Generate) -> None:
        self._prompts, self._generate = prompts, generate
        self._encode_lock = threading.Lock()  # two threads must not be inside a fast tokenizer at once
        self._device = f"{socket.gethostname()}:{device_name(engine)}"

    def fuse(self, unit: UnitBatch) -> UnitBatch:
        """Every row that waited has a generation afterwards, or an error of its own. Equal pairs are written once."""
        pairs, places = waiting_pairs(unit.table)
        began = time.monotonic()
        with self._encode_lock:
            built = self._prompts.build(pairs)
        prompts = [prompt for prompt in built if isinstance(prompt, Prompt)]
        written, busy_s = self._generate(unit.unit.id, prompts) if prompts else ({}, 0.0)
        generations: dict[int, Generation] = {}
        for pair, prompt in zip(pairs, built, strict=True):
            if isinstance(prompt, RowError):
                generation = Generation(pair.row_id, "", FinishReason.ERROR, error=str(prompt))
            else:
                generation = written[prompt.id]
            for place in places[pair.raw, pair.synthetic]:
                generations[place] = generation
        spent = {ENGINE_S: round(time.monotonic() - began, 3), BUSY_S: round(busy_s, 3), DEVICE: self._device}
        return UnitBatch(unit.unit, with_generations(unit.table, generations), unit.apart, spent)
