"""On a CPU: beam engines side by side in one process, each with a thread, a share of the rows, and the same weights.

A decode step of a small model is hundreds of short operations. Torch would split each of them over its threads, which then
meet, and spin while they wait, hundreds of times a step; lanes meet every few steps. On 2 cores that is half as many captions again
(benchmarks/README.md). On a GPU there is one engine, and no lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.core.types import Generation, Prompt
from capsfusion_ray.engines.base import Engine, Load
from capsfusion_ray.engines.beam.engine import BeamEngine
from capsfusion_ray.engines.beam.weights import Weights, take_weights
from capsfusion_ray.engines.loading import LoadedModel, load_model

STEPS = (
    8  # of a lane between two meetings: one step takes a lane longer than another, which refills; over 8 it evens out
)


def build(engine: EngineConfig, decode: DecodeConfig) -> Engine:
    """What engine.kind=beam names; raises what `engines.base.Engine` says."""
    if engine.threads is not None:
        torch.set_num_threads(engine.threads)
    return side_by_side(load_model(engine), engine, decode)


def side_by_side(
    loaded: LoadedModel,
    engine: EngineConfig,
    decode: DecodeConfig,
    weights: Weights | None = None,
    kind: type[BeamEngine] = BeamEngine,
) -> Engine:
    """On a CPU as many lanes as torch has threads here, which leaves torch one for each; else a single engine."""
    threads = torch.get_num_threads() if loaded.device.type == "cpu" else 1
    lanes = min(threads, engine.slots or threads)
    if lanes == 1:
        return kind(loaded, engine, decode, weights)
    torch.set_num_threads(1)
    if weights is None:
        with torch.inference_mode():
            weights = take_weights(loaded, engine.max_prompt_tokens + decode.max_new_tokens)
    share = replace(engine, slots=engine.slots and -(-engine.slots // lanes))
    return Lanes([kind(loaded, share, decode, weights) for _ in range(lanes)])


class Lanes:
    """Implements engines.base.Engine over several; a row goes to the lane with the fewest."""

    def __init__(self, lanes: Sequence[BeamEngine]) -> None:
        self._lanes = lanes
        self._threads = ThreadPoolExecutor(len(lanes), thread_name_prefix="lane")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._lanes[0].encode(texts)

    @property
    def unfinished(self) -> int:
        return sum(lane.unfinished for lane in self._lanes)

    @property
    def load(self) -> Load:
        loads = [lane.load for lane in self._lanes]
        kv_share = sum(load.kv_share for load in loads) / len(loads)
        return Load(sum(load.busy for load in loads), sum(load.room for load in loads), kv_share)

    def submit(self, prompts: Sequence[Prompt]) -> None:
        rows = [lane.unfinished for lane in self._lanes]
        shares: list[list[Prompt]] = [[] for _ in self._lanes]
        for prompt in prompts:
            fewest = rows.index(min(rows))
            shares[fewest].append(prompt)
            rows[fewest] += 1
        for lane, share in zip(self._lanes, shares, strict=True):
            lane.submit(share)

    def step(self) -> list[Generation]:
        """Some steps of each lane that has work, at the same time."""
        working = [lane for lane in self._lanes if lane.unfinished]
        return [generation for finished in self._threads.map(_steps, working) for generation in finished]


def _steps(lane: BeamEngine) -> list[Generation]:
    finished: list[Generation] = []
    for _ in range(STEPS):
        finished += lane.step()
        if not lane.unfinished:
            break
    return finished
