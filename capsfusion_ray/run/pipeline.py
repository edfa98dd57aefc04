"""The Ray Data graph, on one screen: read -> fuse -> judge and commit. A dataset row is a unit (see units.py).

read    CPU task    a span of neighbouring units: decoded once, filtered, admitted; one row a unit
fuse    actor       an engine, loaded once; several units in flight
commit  CPU task    gates, one put-if-absent; yields the unit's summary
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

# Read when ray.data is imported. A killed driver keeps its share of the cluster until its last request for it runs out, by
# default after 180 s: the resumed run would have half the CPUs for so long. A living driver asks anew every 10 s.
os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", "60")

import ray
from ray.data import ActorPoolStrategy, DataContext, Datasource, TaskPoolStrategy
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask
from ray.exceptions import RayTaskError

from capsfusion_ray.config import ApiConfig, DecodeConfig, EngineConfig, GatesConfig
from capsfusion_ray.core.accounting import UnitSummary
from capsfusion_ray.core.plan import read_tasks
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.core.unit_batch import Apart, UnitBatch, unit_in_traceback
from capsfusion_ray.core.unit_steps import admit, judge_unit
from capsfusion_ray.dataset.unit_files import commit
from capsfusion_ray.errors import CapsFusionError, CostCapReached
from capsfusion_ray.run.actor import FusionActor
from capsfusion_ray.run.engine_starts import StartLog
from capsfusion_ray.run.poison_rows import AttemptLog
from capsfusion_ray.run.preemption import NodeNotice
from capsfusion_ray.run.prometheus import EngineMonitor, tell_store_faults
from capsfusion_ray.sources import ReadSpec, Shard, read_patiently
from capsfusion_ray.storage import Store, patiently

# Asked for beside the actors' own CPUs, so that idle actors cannot starve the reads. The two differ on purpose: Ray
# fuses stages with equal resources into one process, and an actor that also reads and judges stops feeding its GPU.
READ_CPUS = 0.25
COMMIT_CPUS = 0.2
NO_PROGRESS_TIMEOUT_S = -1  # a long gap without any spot node is no failure


@dataclass(frozen=True)
class Job:
    """What every stage must know; travels to the workers once a task."""

    read: ReadSpec
    gates: GatesConfig
    engine: EngineConfig
    decode: DecodeConfig
    template: str
    fields: tuple[tuple[str, str], ...]
    output: Store
    run: str  # this driver's own: the lease holder's id


@dataclass(frozen=True)
class Pool:
    """The actor pool, resolved for the cluster at hand."""

    min_actors: int
    max_actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    units_in_flight: int


def run_units(job: Job, pool: Pool, units: Sequence[WorkUnit], shards: dict[str, Shard]) -> Iterator[UnitSummary]:
    """Fuse and commit every unit; their summaries in the order of commit. Raises what a stage raised."""
    groups = read_tasks(units, {path: shard.row_groups for path, shard in shards.items()})
    return run_batches(job, pool, UnitSource(job, groups, shards), len(groups))


def data_context() -> DataContext:
    """Ray Data's settings of this process, as every graph here wants them."""
    context = DataContext.get_current()
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    context.raise_original_map_exception = True
    context.enable_progress_bars = False  # progress.py counts captions, from commits …
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # … and to be told so is of use to nobody
    context.print_on_execution_start = False
    return context


def run_batches(job: Job, pool: Pool, source: Datasource, read_tasks: int) -> Iterator[UnitSummary]:
    """The graph, whatever its units are read from."""
    data_context().target_max_block_size = 1  # one row a block: a row is a unit, and is scheduled alone
    # One reader, and one committer, keep up with any GPU; more would be processes that start, hold memory and wait.
    tasks = TaskPoolStrategy(size=pool.max_actors)
    attempts = AttemptLog(job.output, job.run)
    starts = StartLog(job.output, job.run, job.engine.start_patience_s)
    dataset = (
        ray.data.read_datasource(
            source,
            override_num_blocks=read_tasks,
            num_cpus=READ_CPUS,
            compute=tasks,
        )
        .map_batches(
            FusionActor,
            fn_constructor_args=(job.engine, job.decode, job.template, attempts, EngineMonitor(), NodeNotice(), starts),
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ActorPoolStrategy(
                min_size=pool.min_actors,
                max_size=pool.max_actors,
                max_tasks_in_flight_per_actor=2 * pool.units_in_flight,
                max_concurrent_calls_per_actor=pool.units_in_flight,
                enable_true_multi_threading=True,  # one engine thread serves all calls: see actors.py
            ),
            num_cpus=pool.cpus_per_actor,
            num_gpus=pool.gpus_per_actor,
        )
        .map_batches(
            judge_and_commit,
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


def within_cap(summaries: Iterable[UnitSummary], api: ApiConfig, actors: int) -> Iterator[UnitSummary]:
    """The summaries, until together they cost what all actors may spend: an actor that is restarted begins to count anew.

    Raises CostCapReached then.
    """
    spent = 0.0
    for summary in summaries:
        if api.max_dollars is not None and spent >= api.max_dollars * actors:
            raise CostCapReached(
                f"engine.api.max_dollars={api.max_dollars:g}: the units of this run cost {spent:.4f} dollars, by the server's token counts, "
                f"which is what its {actors} actors may spend; what is committed is kept, and the same command with a higher cap goes on"
            )
        spent += api.dollars(summary.prompt_tokens, summary.output_tokens)
        yield summary


class UnitSource(Datasource):
    """One ReadTask a span: units that share a row group or a stream file are decoded together, once."""

    def __init__(self, job: Job, groups: Sequence[Sequence[WorkUnit]], shards: dict[str, Shard]) -> None:
        super().__init__()
        self._job, self._spans, self._shards = job, groups, shards

    def get_name(self) -> str:
        return "Units"

    def estimate_inmemory_data_size(self) -> int | None:
        return sum(self._shards[span[0].path].size for span in self._spans)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        job = ray.put(self._job)
        tasks = []
        for span in self._spans:
            metadata = BlockMetadata(num_rows=len(span), size_bytes=None, input_files=None, exec_stats=None)
            tasks.append(ReadTask(_Read(job, self._shards[span[0].path], tuple(span)), metadata))
        return tasks


@dataclass(frozen=True)
class _Read:
    """What one ReadTask runs; a class so that it pickles small."""

    job: Any  # ObjectRef of the Job
    shard: Shard
    units: tuple[WorkUnit, ...]

    def __call__(self) -> Iterable[pa.Table]:
        job: Job = ray.get(self.job)
        reads = read_patiently(self.shard, [(unit.start, unit.stop) for unit in self.units], job.read)
        for unit in self.units:
            with unit_in_traceback(unit):
                read = next(reads)
            filtered = {str(reason): rows for reason, rows in read.filtered.items() if rows}
            unreadable = tuple((lost.start, lost.stop, lost.error) for lost in read.unreadable)
            tell_store_faults()
            yield UnitBatch(unit, admit(read.table, job.gates), Apart(filtered, unreadable)).pack()


def judge_and_commit(batch: pa.Table, job: Job) -> pa.Table:
    """The last stage: verdicts, the part, one put-if-absent."""
    unit = UnitBatch.unpack(batch)
    with unit_in_traceback(unit.unit):
        part, summary = judge_unit(unit, job.fields, job.gates)
        patiently(lambda: commit(job.output, part, summary))
    tell_store_faults()
    return pa.table({"summary": [json.dumps(asdict(summary))]})


_RAY_ADVICE = (
    "\nFailed to apply UDF transform"  # on Ray Data's own retries, which are off: it appends that to every message
)


@contextmanager
def as_raised() -> Iterator[None]:
    """What a task raised on purpose comes out as itself: the doorway says it in one line. A bug keeps Ray's traceback."""
    try:
        yield
    except RayTaskError as error:
        if not isinstance(error.cause, CapsFusionError):
            raise
        message, *_ = str(error.cause).split(_RAY_ADVICE)
        raise type(error.cause)(message) from None
