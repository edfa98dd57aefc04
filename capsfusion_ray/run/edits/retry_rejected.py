"""Fuse rejected rows again, with other settings, and merge what comes of them into the dataset: retry=rejected.

Its units are those that hold such rejects; of their rows only these rejects are fused again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from capsfusion_ray.config import OutputConfig
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
from capsfusion_ray.run.edits.base import Edit
from capsfusion_ray.run.stages import Job, UnitReads
from capsfusion_ray.storage import Store

# No other model or setting changes these: the text itself could not be read.
FINAL = frozenset((Reason.INVALID_UTF8, Reason.UNPARSABLE))


def reasons_of(retry: str) -> tuple[str, ...]:
    """The reasons that `retry` names: `rejected` for all that another setting may change, or some, separated by commas.

    Raises ConfigError.
    """
    known = {str(reason) for reason in Reason} - {str(reason) for reason in FINAL}
    if retry == "rejected":
        return tuple(sorted(known))
    asked = {name.strip() for name in retry.split(",") if name.strip()}
    if not asked or not asked <= known:
        raise ConfigError(f"retry={retry}: must be 'rejected', or some of {', '.join(sorted(known))}")
    return tuple(sorted(asked))


@dataclass(frozen=True)
class Retry(Edit):
    """One retry. `reasons`: rows that were rejected for one of these are fused again."""

    reasons: tuple[str, ...]

    @property
    def unit_rows(self) -> dict[str, int]:
        # An upper bound: a kept row has a reason too.
        counts = {unit.id: sum(unit.reasons.get(r, 0) for r in self.reasons) for unit in self.manifest.units}
        return {unit_id: rows for unit_id, rows in counts.items() if rows}

    def reads(self, entries: Sequence[GroupEntry], units: Sequence[WorkUnit]) -> list[UnitReads]:
        """One read task per group: its rejected files are read once, for all its units."""
        held = {unit.id: unit for unit in units}
        tasks = []
        for entry in entries:
            if again := tuple(held[unit.id] for unit in entry.units if unit.id in held):
                size = sum(file.bytes for file in entry.files if file.kind == "rejected")
                tasks.append(UnitReads(ReadRejects(self.rewriter.reader, entry, again, self.reasons), len(again), size))
        return tasks

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
    """Note that a retry is begun, and return it; None where the last revision is this very retry.

    Raises ConfigError for an output that is not finished or that another edit was begun on, and AccountingError for
    damaged rejected files.
    """
    manifest = read_finished(store, f"retry={retry}")
    reasons = reasons_of(retry)
    record = {"kind": "retry", "reasons": list(reasons), "settings": settings}
    last = manifest.revisions[-1]
    if all(last.get(key) == value for key, value in record.items()):
        clean(store, manifest)  # it may have been killed after it published the manifest
        return None
    edition = begin_edit(store, manifest, record, [file for file in manifest.files if file.kind == "rejected"])
    return Retry(store, plans, manifest, edition, output_as_begun(output, manifest), record, reasons)


@dataclass(frozen=True)
class ReadRejects:
    """Reads the rows of `units`, of one group, that were rejected for one of `reasons`."""

    reader: RowReader
    entry: GroupEntry
    units: tuple[WorkUnit, ...]
    reasons: tuple[str, ...]

    def __call__(self, job: Job) -> Iterator[UnitBatch]:
        """One batch per unit, admitted under the new settings; the unit's other rows only count."""
        found = self._rejects()
        schema = pa.schema([*PAIR_FIELDS, *extra_fields(self.reader.fields)])
        for unit in self.units:
            tables = [table.select(schema.names).cast(schema) for table in found[unit.id]]
            # The rows of a unit may be in files of several partitions: back into their order.
            table = in_row_order([schema.empty_table(), *tables])
            table = table.append_column(INVALID, pa.nulls(table.num_rows, pa.string()))
            yield UnitBatch(unit, admit(table, job.gates), Apart(not_retried=unit.rows - table.num_rows))

    def _rejects(self) -> dict[str, list[pa.Table]]:
        """By unit id, a table per rejected file that holds rows of the unit."""
        found: dict[str, list[pa.Table]] = {unit.id: [] for unit in self.units}
        reasons = pa.array(self.reasons, pa.string())
        for file in self.entry.files:
            if file.kind == "rejected":
                for unit_id, rows in self.reader.rows_of(file):
                    if unit_id in found:
                        found[unit_id].append(rows.filter(pc.is_in(rows[REASON], reasons)))
        return found
