"""Measure how fast one actor is on the cluster at hand: a sample of the input goes through the real engine, nothing is written."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from capsfusion_ray.config import DecodeConfig, EngineConfig, FuseConfig
from capsfusion_ray.core.types import CaptionPair, FinishReason, Generation, Prompt
from capsfusion_ray.engines.base import Engine
from capsfusion_ray.errors import EngineError
from capsfusion_ray.run.engine_loop import start_engine
from capsfusion_ray.run.executors.base import open_executor

FILLS = 4  # captions of a calibration, in fills of the engine's slots: one to fill it, one to empty it, two to measure
Device = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Measured:
    """One actor's speed while its engine is full, and the tokens of a caption."""

    captions_per_s: float
    captions: int
    prompt_tokens: float  # mean per caption
    output_tokens: float  # mean per caption
    device: Device
    captions_in_flight: int  # captions that the engine decodes at the same time


def calibrate(cfg: FuseConfig, template: str, pairs: Sequence[CaptionPair]) -> Measured:
    """Run one engine over the pairs, with the share of the resources that a fuse run would give one actor.

    Raises what the cluster and the engine raise, and EngineError where no pair becomes a caption.
    """
    with closing(open_executor(cfg.cluster)) as executor:
        pool = executor.resolve_pool(cfg.engine, units=sys.maxsize)
        engine = executor.resolve_engine(cfg.engine, pool)
        return executor.run_as_actor(pool, _measure, engine, cfg.decode, template, list(pairs))


def _measure(engine: EngineConfig, decode: DecodeConfig, template: str, pairs: list[CaptionPair]) -> Measured:
    built, builder = start_engine(engine, decode, template)
    prompts = [prompt for prompt in builder.build(pairs) if isinstance(prompt, Prompt)]
    return steady(built, prompts, "cuda" if engine.device == "cuda" else "cpu", time.monotonic)


def steady(engine: Engine, prompts: Sequence[Prompt], device: Device, clock: Callable[[], float]) -> Measured:
    """The engine's speed while it is full: from when all its slots are taken until no prompt is left to refill them.

    The prompts are repeated until there are FILLS times as many as the engine has slots. Raises EngineError where none of
    them becomes a caption.
    """
    wanted, submitted, began = len(prompts), 0, clock()
    moments: list[
        tuple[float, int]
    ] = []  # each moment at which the engine was full, and the captions finished until then
    written: list[Generation] = []
    failed: list[Generation] = []
    while submitted < wanted or engine.unfinished:
        if submitted < wanted:
            engine.submit(_copies(prompts, submitted, wanted))
            submitted = wanted
        for generation in engine.step():
            (failed if generation.finish in (FinishReason.ERROR, FinishReason.CRASH) else written).append(generation)
        slots = engine.occupancy.capacity
        wanted = max(wanted, FILLS * slots)
        if slots <= len(written) and engine.unfinished >= slots:
            moments.append((clock(), len(written)))
    if not written:
        error = failed[-1].error if failed else "no prompt fits the model"
        raise EngineError(f"calibrate: none of {len(failed)} prompts became a caption: {error}")
    if not moments or moments[0][1] == moments[-1][1]:  # nothing finished while it was full: the whole time counts
        moments = [(began, 0), (clock(), len(written))]
    (start, before), (end, after) = moments[0], moments[-1]
    prompt_tokens, output_tokens = (
        sum(getattr(generation, name) for generation in written) / len(written)
        for name in ("prompt_tokens", "output_tokens")
    )
    speed = (after - before) / max(end - start, 1e-9)
    return Measured(round(speed, 3), len(written), prompt_tokens, output_tokens, device, slots)


def _copies(prompts: Sequence[Prompt], start: int, stop: int) -> list[Prompt]:
    """The prompts numbered [start, stop) of the endless repetition of `prompts`, each with an id of its own."""
    return [dataclasses.replace(prompts[i % len(prompts)], id=f"calibrate-{i}") for i in range(start, stop)]
