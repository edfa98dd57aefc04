"""Flag or reject the rows whose caption a run wrote for too many different pairs. Rules: core/repeated_captions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from capsfusion_ray.config import GateConfig
from capsfusion_ray.core.accounting import UnitSummary
from capsfusion_ray.core.columns import DETAIL, FLAGS, FUSED, REASON
from capsfusion_ray.core.repeated_captions import REPEATED, Repeated, holds, mark_part, repeated
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.dataset.layout import REJECTED_DIR
from capsfusion_ray.dataset.manifest import GroupEntry
from capsfusion_ray.dataset.rewriter import Change, Rewriter
from capsfusion_ray.dataset.unit_files import read_part
from capsfusion_ray.storage import Store

log = logging.getLogger(__name__)


def judge_repeats(
    rewriter: Rewriter, entries: Sequence[GroupEntry], gate: GateConfig, may_write: Callable[[], None]
) -> list[GroupEntry]:
    """Mark the captions that the whole run repeats too often; all entries, those of groups with such a row in a new edition.

    Repeated after a kill it finds the same captions, because rows that are marked already still count. `may_write`: see
    Rewriter.each.
    """
    if gate.action == "ignore":
        return list(entries)
    fused = sum(unit.fused + unit.reasons.get(REPEATED, 0) for entry in entries for unit in entry.units)
    captions = repeated((entry.repeats for entry in entries), fused, gate.threshold)
    if not captions:
        return list(entries)
    log.warning(
        "%d captions were written for %d or more different pairs each; action: %s",
        len(captions),
        min(captions.values()),
        gate.action,
    )
    marks = Repeated(captions, gate.action == "reject")
    return rewriter.each(entries, lambda entry: mark_repeated(rewriter, entry, marks), may_write)


def mark_repeated(rewriter: Rewriter, entry: GroupEntry, captions: Repeated) -> GroupEntry | None:
    """Flag or reject the group's rows with one of these captions; None where no row has one, or all such rows are marked."""

    def is_unmarked(rows: pa.Table) -> pa.Array:
        marked = pa.array([REPEATED in (flags or ()) for flags in rows[FLAGS].to_pylist()], pa.bool_())
        return pc.and_not(holds(rows, captions), marked)

    def reject(kind: str, rows: pa.Table, hits: pa.Array, unit: UnitSummary) -> Change:
        return _reject(kind, rows, hits, unit, captions)

    return rewriter.change_rows(entry, is_unmarked, reject if captions.reject else _flag)


def _flag(kind: str, rows: pa.Table, hits: pa.Array, unit: UnitSummary) -> Change:
    flags = [
        [*(old or ()), REPEATED] if hit else old
        for old, hit in zip(rows[FLAGS].to_pylist(), hits.to_pylist(), strict=True)
    ]
    flagged = rows.set_column(rows.schema.get_field_index(FLAGS), FLAGS, pa.array(flags, pa.list_(pa.string())))
    return {kind: flagged}, unit.with_flag(REPEATED, pc.sum(hits).as_py() or 0)


def _reject(kind: str, rows: pa.Table, hits: pa.Array, unit: UnitSummary, captions: Repeated) -> Change:
    going = rows.filter(hits)
    details = [captions.detail(text) for text in going[FUSED].to_pylist()]
    rejects = going.append_column(REASON, pa.array([REPEATED] * going.num_rows, pa.string())).append_column(
        DETAIL, pa.array(details, pa.string())
    )
    summary = unit.without(going, removed=False).with_rejects(REPEATED, going.num_rows)
    return {kind: rows.filter(pc.invert(hits)), REJECTED_DIR: rejects}, summary


def read_marked_part(parts: Store, unit: WorkUnit, captions: Repeated) -> tuple[pa.Table, UnitSummary]:
    """A unit's part and its summary, with the rows that have one of `captions` flagged or rejected."""
    part, summary = read_part(parts, unit)
    part, hits = mark_part(part, captions)
    found = part.filter(hits)
    if not captions.reject:
        return part, summary.with_flag(REPEATED, found.num_rows)
    fused_before = found.drop_columns([REASON])  # UnitSummary.without takes rows without a reason for rows of data/
    return part, summary.without(fused_before, removed=False).with_rejects(REPEATED, found.num_rows)
