"""Fuse rejected rows again, with other settings, and merge what comes of them into the dataset: retry=rejected.

A retry is a revision whose units are those that hold such rejects; only the rejects among their rows are fused again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from capsfusion_ray.config import GatesConfig, OutputConfig
from capsfusion_ray.core.accounting import UnitSummary
from capsfusion_ray.core.columns import INVALID, PAIR_FIELDS, REASON, extra_fields
from capsfusion_ray.core.plan import Plan
from capsfusion_ray.core.repeated_captions import REPEATED, Repeated
from capsfusion_ray.core.types import Reason, WorkUnit
from capsfusion_ray.core.unit_batch import Apart, UnitBatch
from capsfusion_ray.core.unit_steps import admit
from capsfusion_ray.dataset.edit_record import begin_edit, output_as_begun
from capsfusion_ray.dataset.editions import clean
from capsfusion_ray.dataset.manifest import GroupEntry, read_finished
from capsfusion_ray.dataset.merge_retried import merge_retried, repeats_after_retry
from capsfusion_ray.dataset.read_rows import RowReader, in_row_order
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.run.edits.base import Revision
from capsfusion_ray.run.pipeline import Job, Pool, run_batches
from capsfusion_ray.storage import Store

# What another model or setting cannot mend: the text itself could not be read.
FINAL = frozenset((Reason.INVALID_UTF8, Reason.UNPARSABLE))


def reasons_of(retry: str) -> tuple[str, ...]:
    """`rejected`: every reason that may end otherwise; or some of them, separated by commas. Raises ConfigError."""
    known = {str(reason) for reason in Reason} - {str(reason) for reason in FINAL}
    if retry == "rejected":
        return tuple(sorted(known))
    asked = {name.strip() for name in retry.split(",") if name.strip()}
    if not asked or not asked <= known:
        raise ConfigError(f"retry={retry}: must be 'rejected', or some of {', '.join(sorted(known))}")
    return tuple(sorted(asked))


@dataclass(frozen=True)
class Retry(Revision):
    """One retry of one finished output. `reasons`: rows that were rejected for one of these are fused again."""

    reasons: tuple[str, ...]

    @property
    def unit_rows(self) -> dict[str, int]:
        # A kept row has a reason too, so it may be fewer.
        counts = {unit.id: sum(unit.reasons.get(r, 0) for r in self.reasons) for unit in self.manifest.units}
        return {unit_id: rows for unit_id, rows in counts.items() if rows}

    def fuse(
        self, job: Job, pool: Pool, entries: Sequence[GroupEntry], units: Sequence[WorkUnit]
    ) -> Iterable[UnitSummary]:
        source = RejectSource(job, self, entries, units)
        return run_batches(job, pool, source, source.tasks)

    def merge(self, entry: GroupEntry, units: Sequence[WorkUnit], repeated: Repeated) -> GroupEntry:
        return merge_retried(self.rewriter, entry, self.parts, units, self.reasons, repeated)

    def repeats(self, entry: GroupEntry, units: Sequence[WorkUnit]) -> dict[str, int]:
        return repeats_after_retry(self.rewriter.reader, entry, self.parts, units, self.reasons)

    def fused(self, parts: Sequence[UnitSummary]) -> int:
        counts = self.manifest.counts
        marked = 0 if REPEATED in self.reasons else counts.reasons.get(REPEATED, 0)
        return counts.fused + marked + sum(part.fused for part in parts)


def open_retry(
    store: Store, retry: str, settings: dict[str, Any], plans: Sequence[Plan], output: OutputConfig
) -> Retry | None:
    """The retry to do, noted as begun; None where the last revision was this very one.

    Raises ConfigError for an output that is not finished, or that another revision was begun on, AccountingError for damaged rejects.
    """
    manifest = read_finished(store, f"retry={retry}")
    reasons = reasons_of(retry)
    record = {"kind": "retry", "reasons": list(reasons), "settings": settings}
    last = manifest.revisions[-1]
    if all(last.get(key) == value for key, value in record.items()):
        clean(store, manifest)  # it may have been killed after its manifest
        return None
    edition = begin_edit(store, manifest, record, [file for file in manifest.files if file.kind == "rejected"])
    return Retry(store, plans, manifest, edition, output_as_begun(output, manifest), record, reasons)


class RejectSource(Datasource):
    """One ReadTask a group: its rejected files are read once, and its units' rejects come out as unit batches."""

    def __init__(self, job: Job, retry: Retry, entries: Sequence[GroupEntry], units: Sequence[WorkUnit]) -> None:
        super().__init__()
        self._job, self._retry = job, retry
        held = {unit.id: unit for unit in units}
        grouped = [(entry, tuple(held[unit.id] for unit in entry.units if unit.id in held)) for entry in entries]
        self._groups = [(entry, mine) for entry, mine in grouped if mine]

    @property
    def tasks(self) -> int:
        return len(self._groups)

    def get_name(self) -> str:
        return "Rejects"

    def estimate_inmemory_data_size(self) -> int | None:
        return sum(file.bytes for entry, _ in self._groups for file in entry.files if file.kind == "rejected")

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        tasks = []
        for entry, units in self._groups:
            metadata = BlockMetadata(num_rows=len(units), size_bytes=None, input_files=None, exec_stats=None)
            read = _reader(self._retry.rewriter.reader, entry, units, self._retry.reasons, self._job.gates)
            tasks.append(ReadTask(read, metadata))
        return tasks


def _reader(
    reader: RowReader, entry: GroupEntry, units: Sequence[WorkUnit], reasons: Sequence[str], gates: GatesConfig
) -> Callable[[], Iterable[pa.Table]]:
    return lambda: (batch.pack() for batch in rejects(reader, entry, units, reasons, gates))


def rejects(
    reader: RowReader, entry: GroupEntry, units: Sequence[WorkUnit], reasons: Sequence[str], gates: GatesConfig
) -> Iterable[UnitBatch]:
    """Each unit's rows that were rejected for `reasons`, admitted under the new settings; its other rows are settled."""
    wanted = {unit.id: unit for unit in units}
    found: dict[str, list[pa.Table]] = {unit.id: [] for unit in units}
    for file in entry.files:
        if file.kind == "rejected":
            for unit_id, rows in reader.rows_of(file):
                if unit_id in wanted:
                    found[unit_id].append(rows.filter(pc.is_in(rows[REASON], pa.array(list(reasons), pa.string()))))
    schema = pa.schema([*PAIR_FIELDS, *extra_fields(reader.fields)])
    for unit in units:
        tables = [table.select(schema.names).cast(schema) for table in found[unit.id]]
        # Files of different partitions interleave a unit's rows: back into their order.
        table = in_row_order([schema.empty_table(), *tables])
        table = table.append_column(INVALID, pa.nulls(table.num_rows, pa.string()))
        yield UnitBatch(unit, admit(table, gates), Apart(not_retried=unit.rows - table.num_rows))
