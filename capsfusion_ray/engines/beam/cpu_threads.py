"""One beam engine per CPU thread, all in one process with the same weights. The rows are distributed among them.

A decode step of a small model is hundreds of short operations. If torch splits each operation over its threads, they
synchronise hundreds of times per step and spin while they wait. Here each thread runs an engine of its own, and the
threads synchronise only every few steps. On 2 cores that writes half as many captions again (benchmarks/README.md).
On a GPU there is a single engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.core.types import Generation, Prompt
from capsfusion_ray.engines.base import Engine, Occupancy
from capsfusion_ray.engines.beam.engine import BeamEngine
from capsfusion_ray.engines.beam.weights import Weights, take_weights
from capsfusion_ray.engines.loading import LoadedModel, load_model

# Decode steps of each engine between two synchronisations. A single step takes longer in the engine that refills its
# slots; over 8 steps these differences even out.
STEPS_BETWEEN_SYNCS = 8


def build(engine: EngineConfig, decode: DecodeConfig) -> Engine:
    """Load the model and build the engine of engine.kind=beam. Raises what `engines.base.Engine` says."""
    if engine.threads is not None:
        torch.set_num_threads(engine.threads)
    return engine_per_thread(load_model(engine), engine, decode)


def engine_per_thread(
    loaded: LoadedModel,
    engine: EngineConfig,
    decode: DecodeConfig,
    weights: Weights | None = None,
    kind: type[BeamEngine] = BeamEngine,
) -> Engine:
    """Build one engine per thread of torch on a CPU, and a single engine on a GPU.

    Where it builds several, it sets torch to one thread for each of them. There are never more engines than
    engine.slots. `weights` are those that `take_weights` took from this model before; `kind` is the engine's class.
    """
    threads = torch.get_num_threads() if loaded.device.type == "cpu" else 1
    number = min(threads, engine.slots or threads)
    if number == 1:
        return kind(loaded, engine, decode, weights)
    torch.set_num_threads(1)
    if weights is None:
        with torch.inference_mode():
            weights = take_weights(loaded, engine.max_prompt_tokens + decode.max_new_tokens)
    share = replace(engine, slots=engine.slots and -(-engine.slots // number))
    return EnginePerThread([kind(loaded, share, decode, weights) for _ in range(number)])


class EnginePerThread:
    """Implements engines.base.Engine over several engines. A prompt goes to the engine with the fewest unfinished ones."""

    def __init__(self, engines: Sequence[BeamEngine]) -> None:
        self._engines = engines
        self._threads = ThreadPoolExecutor(len(engines), thread_name_prefix="beam engine")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._engines[0].encode(texts)

    @property
    def unfinished(self) -> int:
        return sum(engine.unfinished for engine in self._engines)

    @property
    def occupancy(self) -> Occupancy:
        each = [engine.occupancy for engine in self._engines]
        kv_share = sum(one.kv_share for one in each) / len(each)
        return Occupancy(sum(one.busy for one in each), sum(one.capacity for one in each), kv_share)

    def submit(self, prompts: Sequence[Prompt]) -> None:
        rows = [engine.unfinished for engine in self._engines]
        shares: list[list[Prompt]] = [[] for _ in self._engines]
        for prompt in prompts:
            fewest = rows.index(min(rows))
            shares[fewest].append(prompt)
            rows[fewest] += 1
        for engine, share in zip(self._engines, shares, strict=True):
            engine.submit(share)

    def step(self) -> list[Generation]:
        """Run STEPS_BETWEEN_SYNCS steps of each engine that has unfinished prompts, in parallel."""
        working = [engine for engine in self._engines if engine.unfinished]
        return [generation for finished in self._threads.map(_steps, working) for generation in finished]


def _steps(engine: BeamEngine) -> list[Generation]:
    finished: list[Generation] = []
    for _ in range(STEPS_BETWEEN_SYNCS):
        finished += engine.step()
        if not engine.unfinished:
            break
    return finished
