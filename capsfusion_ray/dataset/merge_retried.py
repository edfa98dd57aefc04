"""Merge the parts of a retry into the group that their rows were rejected in. Rows that were not retried stay as they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from capsfusion_ray.core.accounting import UnitSummary
from capsfusion_ray.core.columns import REASON
from capsfusion_ray.core.repeated_captions import REPEATED, Repeated, Tally, after_retry
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.dataset.layout import DATA_DIR, REJECTED_DIR
from capsfusion_ray.dataset.manifest import GroupEntry
from capsfusion_ray.dataset.mark_repeated import read_marked_part
from capsfusion_ray.dataset.read_rows import RowReader, in_row_order
from capsfusion_ray.dataset.rewriter import Rewriter
from capsfusion_ray.dataset.unit_files import read_part, split_part
from capsfusion_ray.storage import Store


def repeats_after_retry(
    reader: RowReader, entry: GroupEntry, parts: Store, units: Sequence[WorkUnit], reasons: Collection[str]
) -> dict[str, int]:
    """The `repeats` that the group's entry will have once merge_retried has merged the same units."""
    gone, come = Tally(), Tally()
    again = {unit.id for unit in units}
    for file in entry.files if REPEATED in reasons else ():
        if file.kind == REJECTED_DIR:
            for rows in (rows for unit_id, rows in reader.rows_of(file) if unit_id in again):
                gone.add(rows.filter(pc.equal(rows[REASON], REPEATED)))
    for unit in units:
        part, _ = read_part(parts, unit)
        come.add(split_part(part)[0])
    return after_retry(entry.repeats, gone, come)


def merge_retried(
    rewriter: Rewriter,
    entry: GroupEntry,
    parts: Store,
    units: Sequence[WorkUnit],
    reasons: Collection[str],
    repeated: Repeated,
) -> GroupEntry:
    """Replace the rows of `units` that were rejected for one of `reasons` by the rows of their `parts`; the new entry.

    `entry` has the `repeats` of the new entry already (repeats_after_retry). Rows of the parts that have one of the
    `repeated` captions are marked.
    """
    again = {unit.id: unit for unit in units}
    retried = {unit.id: read_marked_part(parts, unit, repeated) for unit in units}
    still_rejected, summaries = _without_retried(rewriter.reader, entry, again, reasons)
    files = rewriter.new_files(entry)
    for unit in entry.units:
        rejects = still_rejected.get(unit.id, [])
        if unit.id in again:
            part, summary = retried[unit.id]
            data, rejected = split_part(part)
            files.write(DATA_DIR, unit.id, data)
            rejects = [*rejects, rejected]
            summaries[unit.id] = summaries[unit.id].with_retried(summary)
        if rejects:
            shared = [name for name in rejects[0].column_names if all(name in rows.column_names for rows in rejects)]
            files.write(REJECTED_DIR, unit.id, in_row_order([rows.select(shared) for rows in rejects]))
    untouched = [file for file in entry.files if file.kind == DATA_DIR]
    return rewriter.write_entry(entry, summaries, (*untouched, *files.close()))


def _without_retried(
    reader: RowReader, entry: GroupEntry, again: Collection[str], reasons: Collection[str]
) -> tuple[dict[str, list[pa.Table]], dict[str, UnitSummary]]:
    """The rejects of each unit that are not retried, and the summaries of all units without those that are."""
    summaries = {unit.id: unit for unit in entry.units}
    still_rejected: dict[str, list[pa.Table]] = {}
    for file in entry.files:
        if file.kind != REJECTED_DIR:
            continue
        for unit_id, rows in reader.rows_of(file):
            if unit_id in again:
                going = pc.is_in(rows[REASON], pa.array(list(reasons), pa.string()))
                summaries[unit_id] = summaries[unit_id].without(rows.filter(going), removed=False)
                rows = rows.filter(pc.invert(going))
            still_rejected.setdefault(unit_id, []).append(rows)
    return still_rejected, summaries
