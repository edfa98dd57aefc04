"""A pipeline with Ray Data alone, for comparison: read_parquet, the echo engine and the default gates, write_parquet.

    python benchmarks/plain_ray_data.py CORPUS OUTPUT [--actors N] [--checkpoint FOLDER]

Run by compare_ray_data.py. No plan, no units, no accounting, no compaction. Without --actors all is one fused task a block; with
it the engine sits in an actor pool, as one that holds a GPU must, and the gates run in tasks behind it. --checkpoint is
Ray's own (CheckpointConfig of 2.60): the ids of every written block, by the integer column `hash`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time

import pyarrow as pa
import ray
from bench_pipeline import COLUMNS
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig

from capsfusion_ray.config import DecodeConfig, EngineConfig, GatesConfig
from capsfusion_ray.core.gates import judge, judge_sources
from capsfusion_ray.core.prompt import TEMPLATE, PromptBuilder
from capsfusion_ray.core.types import CaptionPair, FinishReason, Generation, Prompt
from capsfusion_ray.engines.base import Engine, build_engine
from capsfusion_ray.run.private_cluster import start_here

BATCH_ROWS = 8192
GATES = GatesConfig()


class Writer:
    """The engine's step: adds the caption, how it ended, and what the sources' own gates decided."""

    def __init__(self) -> None:
        config = EngineConfig(kind="echo")
        self._engine: Engine = build_engine(config, DecodeConfig())
        self._prompts = PromptBuilder(TEMPLATE, self._engine.encode, config.max_prompt_tokens)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = enumerate(zip(batch["TEXT"].to_pylist(), batch["top_caption"].to_pylist(), strict=True))
        verdicts = {i: (raw, synthetic, judge_sources(raw, synthetic, GATES)) for i, (raw, synthetic) in rows}
        pairs = [
            CaptionPair(str(i), raw, synthetic) for i, (raw, synthetic, verdict) in verdicts.items() if verdict is None
        ]
        self._engine.submit([prompt for prompt in self._prompts.build(pairs) if isinstance(prompt, Prompt)])
        written: dict[int, Generation] = {}
        while self._engine.unfinished:
            written |= {int(generation.id): generation for generation in self._engine.step()}
        texts = [written[i].text if i in written else None for i in verdicts]
        finishes = [str(written[i].finish) if i in written else None for i in verdicts]
        outcomes = [str(verdict.outcome) if verdict else None for _, _, verdict in verdicts.values()]
        for name, values in (("capsfusion", texts), ("finish", finishes), ("outcome", outcomes)):
            batch = batch.append_column(name, pa.array(values, pa.string()))
        return batch


def judged(batch: pa.Table) -> pa.Table:
    """The gates on every caption that was written."""
    names = ("TEXT", "top_caption", "capsfusion", "finish", "outcome")
    outcomes: list[str] = []
    reasons: list[str | None] = []
    flags: list[list[str]] = []
    for raw, synthetic, text, finish, outcome in zip(*(batch[name].to_pylist() for name in names), strict=True):
        if finish is None:
            outcomes.append(outcome)
            reasons.append(None)
            flags.append([])
            continue
        verdict = judge(CaptionPair("", raw, synthetic), Generation("", text, FinishReason(finish)), GATES)
        outcomes.append(str(verdict.outcome))
        reasons.append(str(verdict.reason) if verdict.reason else None)
        flags.append([str(flag) for flag in verdict.flags])
    batch = batch.drop_columns(["finish", "outcome"]).append_column("outcome", pa.array(outcomes, pa.string()))
    batch = batch.append_column("reason", pa.array(reasons, pa.string()))
    return batch.append_column("flags", pa.array(flags, pa.list_(pa.string())))


_writer: Writer | None = None


def write_here(batch: pa.Table) -> pa.Table:
    """A task's engine: made once a worker process."""
    global _writer
    _writer = _writer or Writer()
    return _writer(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus")
    parser.add_argument("output")
    parser.add_argument("--actors", type=int, default=0, help="0: the engine runs in tasks")
    parser.add_argument("--checkpoint", default="", help="a folder for Ray's own checkpoint")
    options = parser.parse_args()
    start_here(num_cpus=(os.cpu_count() or 1) + 1, logging_level=logging.WARNING)  # as cluster.connect does
    context = DataContext.get_current()
    context.enable_progress_bars = False
    if options.checkpoint:
        # Kept, as a run that may be killed at its end needs it to be; by default Ray deletes it on success.
        context.checkpoint_config = CheckpointConfig("hash", options.checkpoint, delete_checkpoint_on_success=False)
    began = time.monotonic()
    pairs = ray.data.read_parquet(options.corpus).select_columns(list(COLUMNS))
    batches = {"batch_size": BATCH_ROWS, "batch_format": "pyarrow"}
    if options.actors:
        written = pairs.map_batches(Writer, compute=ActorPoolStrategy(size=options.actors), num_cpus=0.5, **batches)
    else:
        written = pairs.map_batches(write_here, **batches)
    written.map_batches(judged, **batches).write_parquet(options.output, compression="zstd")
    print(json.dumps({"pipeline_s": round(time.monotonic() - began, 2)}), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
