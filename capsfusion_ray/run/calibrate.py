"""How fast one actor is on the cluster at hand: a sample of the input through the real engine, nothing written."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import ray

from capsfusion_ray.config import DecodeConfig, EngineConfig, FuseConfig
from capsfusion_ray.core.types import CaptionPair, FinishReason, Prompt
from capsfusion_ray.engines.base import Engine
from capsfusion_ray.errors import EngineError
from capsfusion_ray.run import cluster
from capsfusion_ray.run.actor import start_engine

ROOMS = 4  # captions of a calibration, in rooms of the engine: one to fill it, one to empty it, two to be measured


@dataclass(frozen=True)
class Measured:
    """One actor's steady speed, and what a caption takes."""

    captions_per_s: float
    captions: int
    prompt_tokens: float  # mean, a caption
    output_tokens: float
    device: Literal["cuda", "cpu"]
    together: int  # captions that it writes at a time


def calibrate(cfg: FuseConfig, template: str, pairs: Sequence[CaptionPair]) -> Measured:
    """Run one actor's engine, with the share of the cluster that a fuse run would give it, over the pairs."""
    resources = cluster.connect(cfg.cluster)
    try:
        pool = cluster.resolve_pool(cfg.cluster, cfg.engine, resources, units=sys.maxsize)
        engine = cluster.resolve_engine(cfg.engine, pool, resources)
        task = ray.remote(_measure).options(num_cpus=pool.cpus_per_actor, num_gpus=pool.gpus_per_actor, max_retries=0)
        measured: Measured = ray.get(task.remote(engine, cfg.decode, template, list(pairs)))
        return measured
    finally:
        cluster.disconnect()


def _measure(engine: EngineConfig, decode: DecodeConfig, template: str, pairs: list[CaptionPair]) -> Measured:
    built, builder = start_engine(engine, decode, template)
    prompts = [prompt for prompt in builder.build(pairs) if isinstance(prompt, Prompt)]
    return steady(built, prompts, "cuda" if engine.device == "cuda" else "cpu", time.monotonic)


def steady(
    engine: Engine, prompts: Sequence[Prompt], device: Literal["cuda", "cpu"], clock: Callable[[], float]
) -> Measured:
    """The engine's speed while it is full: after as many captions as it has room for, until it cannot be refilled.

    The prompts are repeated until there are ROOMS times as many as the engine holds. Raises EngineError where none
    of them becomes a caption.
    """
    wanted, submitted, began = len(prompts), 0, clock()
    moments: list[tuple[float, int]] = []  # when the engine was full, and the captions finished until then
    finished = failed = prompt_tokens = output_tokens = 0
    error = "no prompt fits the model"
    while submitted < wanted or engine.unfinished:
        if submitted < wanted:
            copies = [
                dataclasses.replace(prompts[i % len(prompts)], id=f"calibrate-{i}") for i in range(submitted, wanted)
            ]
            engine.submit(copies)
            submitted = wanted
        for generation in engine.step():
            if generation.finish in (FinishReason.ERROR, FinishReason.CRASH):
                failed, error = failed + 1, generation.error
            else:
                finished += 1
                prompt_tokens += generation.prompt_tokens
                output_tokens += generation.output_tokens
        room = engine.occupancy.capacity
        wanted = max(wanted, ROOMS * room)
        if room <= finished and engine.unfinished >= room:
            moments.append((clock(), finished))
    if not finished:
        raise EngineError(f"calibrate: none of {failed} prompts became a caption: {error}")
    if not moments or moments[0][1] == moments[-1][1]:  # nothing finished while it was full: the whole time counts
        moments = [(began, 0), (clock(), finished)]
    (start, before), (end, after) = moments[0], moments[-1]
    speed = (after - before) / max(end - start, 1e-9)
    return Measured(round(speed, 3), finished, prompt_tokens / finished, output_tokens / finished, device, room)
