"""The stages of a run, one unit at a time: read -> (an engine writes) -> judge and commit. Every executor runs these.

Knows no Ray: under Ray they are the tasks of one graph (pipeline.py), locally they are calls of a few threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from capsfusion_ray.config import ApiConfig, DecodeConfig, EngineConfig, GatesConfig
from capsfusion_ray.core.accounting import UnitSummary
from capsfusion_ray.core.plan import read_tasks
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.core.unit_batch import Apart, UnitBatch, unit_in_traceback
from capsfusion_ray.core.unit_steps import admit, judge_unit
from capsfusion_ray.dataset.unit_files import commit
from capsfusion_ray.errors import CostCapReached
from capsfusion_ray.sources import ReadSpec, Shard, read_patiently
from capsfusion_ray.storage import Store, patiently


@dataclass(frozen=True)
class Job:
    """What every stage must know. Under Ray it travels to the workers once per process."""

    read: ReadSpec
    gates: GatesConfig
    engine: EngineConfig
    decode: DecodeConfig
    template: str
    fields: tuple[tuple[str, str], ...]
    output: Store
    run: str  # the id of this driver, as the lease holds it


@dataclass(frozen=True)
class UnitReads:
    """One read task: `read` decodes some input together and yields one batch per unit, in order."""

    read: Callable[[Job], Iterable[UnitBatch]]
    units: int
    bytes: int  # size of the input, for Ray's estimates


@dataclass(frozen=True)
class ReadShard:
    """Reads units of one shard; a class, so that it pickles small. Units that share a row group are decoded together."""

    shard: Shard
    units: tuple[WorkUnit, ...]

    def __call__(self, job: Job) -> Iterator[UnitBatch]:
        reads = read_patiently(self.shard, [(unit.start, unit.stop) for unit in self.units], job.read)
        for unit in self.units:
            with unit_in_traceback(unit):
                read = next(reads)
            filtered = {str(reason): rows for reason, rows in read.filtered.items() if rows}
            unreadable = tuple((lost.start, lost.stop, lost.error) for lost in read.unreadable)
            yield UnitBatch(unit, admit(read.table, job.gates), Apart(filtered, unreadable))


def shard_reads(units: Sequence[WorkUnit], shards: Iterable[Shard]) -> list[UnitReads]:
    """The read tasks that yield `units`, each of whose shards must be in `shards`."""
    by_path = {shard.path: shard for shard in shards}
    grouped = read_tasks(units, {path: shard.row_groups for path, shard in by_path.items()})
    return [
        UnitReads(ReadShard(by_path[group[0].path], tuple(group)), len(group), by_path[group[0].path].size)
        for group in grouped
    ]


def judge_and_commit(batch: UnitBatch, job: Job) -> UnitSummary:
    """The last stage: judge every fused row, then put the unit's part into the store unless it is there."""
    with unit_in_traceback(batch.unit):
        part, summary = judge_unit(batch, job.fields, job.gates)
        patiently(lambda: commit(job.output, part, summary))
    return summary


def within_cap(summaries: Iterable[UnitSummary], api: ApiConfig, actors: int) -> Iterator[UnitSummary]:
    """Pass the summaries on until together they cost what all actors may spend.

    Each actor counts its own dollars too, but one that is restarted counts from zero again. Raises CostCapReached.
    """
    spent = 0.0
    for summary in summaries:
        if api.max_dollars is not None and spent >= api.max_dollars * actors:
            raise CostCapReached(
                f"engine.api.max_dollars={api.max_dollars:g}: the units of this run cost {spent:.4f} dollars, by the server's token counts, "
                f"which is what its {actors} actors may spend; committed units are kept, and the same command with a higher cap resumes"
            )
        spent += api.dollars(summary.prompt_tokens, summary.output_tokens)
        yield summary
