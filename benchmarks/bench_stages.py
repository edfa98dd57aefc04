"""Measure the CPU microseconds per row of each stage around the engine, one after the other in one process.

    python benchmarks/bench_stages.py CORPUS [--rows 100000] [--unit 8100] [--profile]

CORPUS: a folder that make_corpus.py wrote. No Ray: its own costs are what bench_pipeline.py shows beyond these. Every stage is run as
the job runs it, on the same units; the engine is `echo` with its actor's threads. --profile also prints where cProfile saw the time.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from capsfusion_ray import sources
from capsfusion_ray.config import FuseConfig, parse_config
from capsfusion_ray.core.columns import PAIR_FIELDS
from capsfusion_ray.core.plan import make_plan, read_tasks
from capsfusion_ray.core.prompt import TEMPLATE
from capsfusion_ray.core.unit_batch import Apart, UnitBatch
from capsfusion_ray.core.unit_steps import admit, judge_unit
from capsfusion_ray.dataset.compaction import compact_group
from capsfusion_ray.dataset.unit_files import commit
from capsfusion_ray.run.actor import ActorTools, FusionActor
from capsfusion_ray.run.poison_rows import AttemptLog
from capsfusion_ray.sources import ReadSpec, iter_units
from capsfusion_ray.storage import Store

T = TypeVar("T")
STAGES = ("read", "admit", "pack", "echo", "judge", "commit", "compact")


class Clock(Counter[str]):
    """CPU seconds by stage."""

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self[stage] += time.process_time() - began

    def timed(self, stage: str, call: Callable[[], T]) -> T:
        with self.of(stage):
            return call()


def run(corpus: str, output: str, rows: int, unit_rows: int) -> tuple[Clock, int]:
    cfg = parse_config(
        FuseConfig, ["source.preset=laion_coco", f"input.path={corpus}", f"output.path={output}", "engine.kind=echo"]
    )
    shards = sources.discover(cfg.input, cfg.source)
    schema = sources.frozen_schema(shards, cfg.source, cfg.filter)
    fields = tuple((f.name, str(f.type)) for f in schema if f.name not in {p.name for p in PAIR_FIELDS})
    plan = make_plan(shards, {}, unit_rows, fields)
    store, clock, done = Store(output), Clock(), 0
    actor = FusionActor(cfg.engine, cfg.decode, TEMPLATE, ActorTools(AttemptLog(store, "bench")))
    by_path = {shard.path: shard for shard in shards}
    groups: dict[str, list] = {}
    for span in read_tasks(plan.units, {shard.path: shard.row_groups for shard in shards}):
        units = iter_units(
            by_path[span[0].path], [(u.start, u.stop) for u in span], ReadSpec(schema, cfg.source, cfg.filter)
        )
        for unit in span:
            if done >= rows:
                break
            read = clock.timed("read", lambda units=units: next(units))
            table = clock.timed("admit", lambda read=read: admit(read.table, cfg.gates))
            batch = clock.timed("pack", lambda unit=unit, table=table: UnitBatch(unit, table, Apart({})).pack())
            batch = clock.timed("echo", lambda batch=batch: actor(batch))
            part, summary = clock.timed(
                "judge", lambda batch=batch: judge_unit(UnitBatch.unpack(batch), fields, cfg.gates)
            )
            clock.timed("commit", lambda part=part, summary=summary: commit(store, part, summary))
            groups.setdefault(unit.group, []).append(unit)
            done += unit.rows
    for group, units in groups.items():
        with clock.of("compact"):
            compact_group(store, group, 1, units, fields, cfg.output)
    return clock, done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("corpus")
    parser.add_argument("--rows", type=float, default=100_000)
    parser.add_argument(
        "--unit", type=int, default=8100, help="rows of a unit; 8,100 are 90 s of a GPU of 90 captions/s"
    )
    parser.add_argument("--profile", action="store_true")
    asked = parser.parse_args()
    profile = cProfile.Profile()
    with tempfile.TemporaryDirectory() as output:
        if asked.profile:
            profile.enable()
        clock, rows = run(asked.corpus, output, int(asked.rows), asked.unit)
        profile.disable()
    if asked.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)
    out = {stage: round(clock[stage] / rows * 1e6, 2) for stage in STAGES}
    total = sum(clock.values())
    for stage, us in out.items():
        print(f"{stage:10} {us:8.2f} us a row")
    print(
        json.dumps(
            {"rows": rows, "us_a_row": out | {"all": round(total / rows * 1e6, 2)}, "rows_a_cpu_s": round(rows / total)}
        )
    )


if __name__ == "__main__":
    main()
