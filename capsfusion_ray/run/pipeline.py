"""The Ray Data graph of a run, on one screen: read -> fuse -> judge and commit. A row of the dataset is a unit (core/unit_batch).

read    CPU task    one read task decodes neighbouring units once, filters and admits them; yields one row per unit
fuse    actor       an engine, loaded once; several units in flight
commit  CPU task    gates, then one put-if-absent per unit; yields the unit's summary
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from capsfusion_ray.core.accounting import UnitSummary
from capsfusion_ray.core.unit_batch import UnitBatch
from capsfusion_ray.run.actor import ActorTools, FusionActor
from capsfusion_ray.run.engine_starts import StartLog
from capsfusion_ray.run.node_notice import NodeNotice
from capsfusion_ray.run.poison_rows import AttemptLog
from capsfusion_ray.run.pool import READ_CPUS, Pool
from capsfusion_ray.run.prometheus import EngineMonitor, count_store_faults
from capsfusion_ray.run.ray_data import ReadTask, TaskSource, as_raised, data_context
from capsfusion_ray.run.stages import Job, UnitReads, judge_and_commit, within_cap

# Not READ_CPUS, on purpose: Ray fuses stages with equal resources into one process, and an actor that also reads and
# judges stops feeding its GPU.
COMMIT_CPUS = 0.2


def run_graph(job: Job, pool: Pool, reads: Sequence[UnitReads]) -> Iterator[UnitSummary]:
    """Fuse and commit every unit of `reads`; the summaries in the order of commit. Raises what a stage raised."""
    data_context().target_max_block_size = 1  # one row per block: a row is a unit, and is scheduled alone
    shared = ray.put(job)
    source = TaskSource("Units", [ReadTask(_ReadPacked(shared, task.read), task.units, task.bytes) for task in reads])
    # One reader and one committer per actor keep up with any GPU; more would be processes that start, hold memory and wait.
    tasks = TaskPoolStrategy(size=pool.max_actors)
    dataset = (
        ray.data.read_datasource(source, override_num_blocks=len(reads), num_cpus=READ_CPUS, compute=tasks)
        .map_batches(
            FusionActor,
            fn_constructor_args=(job.engine, job.decode, job.template, _actor_tools(job)),
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ActorPoolStrategy(
                min_size=pool.min_actors,
                max_size=pool.max_actors,
                max_tasks_in_flight_per_actor=2 * pool.units_in_flight,
                max_concurrent_calls_per_actor=pool.units_in_flight,
                enable_true_multi_threading=True,  # the calls wait for one engine thread: see engine_loop.py
            ),
            num_cpus=pool.cpus_per_actor,
            num_gpus=pool.gpus_per_actor,
        )
        .map_batches(
            commit_batch,
            fn_kwargs={"job": job},
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=tasks,
            num_cpus=COMMIT_CPUS,
        )
    )
    with as_raised():
        summaries = (UnitSummary.parse(json.loads(row["summary"])) for row in dataset.iter_rows())
        yield from within_cap(summaries, job.engine.api, pool.max_actors)


def _actor_tools(job: Job) -> ActorTools:
    starts = StartLog(job.output, job.run, job.engine.start_patience_s)
    return ActorTools(AttemptLog(job.output, job.run), starts, EngineMonitor(), NodeNotice())


@dataclass(frozen=True)
class _ReadPacked:
    """Runs one read task in a worker; each unit comes out as one row."""

    job: Any  # ObjectRef of the Job: 10,000 read tasks that each held it would be slow to pickle
    read: Callable[[Job], Iterable[UnitBatch]]

    def __call__(self) -> Iterable[pa.Table]:
        for batch in self.read(ray.get(self.job)):
            count_store_faults()
            yield batch.pack()


def commit_batch(batch: pa.Table, job: Job) -> pa.Table:
    """The last stage: one row that holds a fused unit -> one row that holds its summary, as JSON."""
    summary = judge_and_commit(UnitBatch.unpack(batch), job)
    count_store_faults()
    return pa.table({"summary": [json.dumps(asdict(summary))]})
