"""Remove rows from a finished output, so that none of their text is left in it. Knows the store; no Ray.

Only data files that hold such a row are rewritten. The accounting counts the rows as `removed`. Copies that were made before (an
export, a comparison page of another output) are not known here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from capsfusion_ray.core.accounting import UnitSummary
from capsfusion_ray.dataset.edit_record import begin_edit, output_as_begun, sweep_unless_unfinished
from capsfusion_ray.dataset.editions import clean, publish
from capsfusion_ray.dataset.layout import COMPARISON, REPORT, part_path
from capsfusion_ray.dataset.lease import Lease
from capsfusion_ray.dataset.manifest import GroupEntry, Manifest, read_finished, read_groups
from capsfusion_ray.dataset.plan_files import read_plans
from capsfusion_ray.dataset.rewriter import Change, Rewriter
from capsfusion_ray.dataset.takedown_criteria import Criteria, TakedownConfig
from capsfusion_ray.dataset.unit_files import committed
from capsfusion_ray.storage import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Done:
    """What one takedown came to. `resumed`: a killed process had rewritten some groups before."""

    removed: int
    groups: int
    swept: int
    resumed: bool


def takedown(cfg: TakedownConfig) -> dict[str, Any]:
    """Remove the rows, publish the new manifest, remove the old files. The same command again continues after a kill.

    Returns removed (rows), not_found (listed lines without a row; None after a kill), groups_rewritten, files_deleted, seconds
    and output. Raises ConfigError for an output that is not finished or has another unfinished edit, AccountingError for a
    damaged data file.
    """
    began = time.monotonic()
    store = Store(cfg.output.path, cfg.output.storage)
    with Lease(store, cfg.takeover) as lease:
        manifest = read_finished(store, "a takedown")
        criteria = Criteria(cfg, dict(read_plans(store)[0].fields))
        done = _remove_and_publish(cfg, store, manifest, criteria, lease)
    if not done.resumed:
        _warn_of_lines_without_rows(cfg, criteria)
    log.info("%d rows removed, %d groups rewritten, %d old files deleted", done.removed, done.groups, done.swept)
    return {
        "removed": done.removed,
        "not_found": None if done.resumed else sum(left for left, _ in criteria.not_found.values()),
        "groups_rewritten": done.groups,
        "files_deleted": done.swept,
        "seconds": round(time.monotonic() - began, 2),
        "output": cfg.output.path,
    }


def _remove_and_publish(
    cfg: TakedownConfig, store: Store, manifest: Manifest, criteria: Criteria, lease: Lease
) -> _Done:
    sweep_unless_unfinished(store, manifest)
    edition = begin_edit(store, manifest, {"kind": "takedown", **criteria.record}, manifest.files)
    rewriter = Rewriter(store, edition, read_plans(store)[0].fields, output_as_begun(cfg.output, manifest))
    before = read_groups(store)
    resumed = any(entry.edition == edition for entry in before)
    entries = rewriter.each(before, lambda entry: remove_rows(rewriter, entry, criteria.is_removed), lease.check)
    groups = sum(entry.edition == edition for entry in entries)
    lease.check()
    record = {"revision": edition, "kind": "takedown", "groups": groups, **criteria.record}
    after = publish(store, manifest, record)
    swept = clean(store, after)
    _remove_other_copies(store)
    return _Done(after.counts.removed - manifest.counts.removed, groups, swept, resumed)


def remove_rows(rewriter: Rewriter, entry: GroupEntry, is_removed: Callable[[pa.Table], pa.Array]) -> GroupEntry | None:
    """Rewrite the data files of a group without the rows for which `is_removed` is true; None where it has no such row."""

    def remove(kind: str, rows: pa.Table, hits: pa.Array, unit: UnitSummary) -> Change:
        return {kind: rows.filter(pc.invert(hits))}, unit.without(rows.filter(hits), removed=True)

    return rewriter.change_rows(entry, is_removed, remove)


def _remove_other_copies(store: Store) -> None:
    """Remove everything else that may hold text of removed rows. Needs the lease, and all units in the manifest."""
    # Parts of attempts that were committed after their group was compacted.
    store.delete([part_path(unit_id) for unit_id in committed(store)])
    # Temporary files, whatever their age: a process that still writes one has lost the lease.
    store.delete_leftovers(older_than_s=0)
    store.delete([REPORT, COMPARISON])  # these pages show some rows


def _warn_of_lines_without_rows(cfg: TakedownConfig, criteria: Criteria) -> None:
    for key, (left, lines) in criteria.not_found.items():
        if left:
            log.warning(
                "%s=%s: %d of its %d lines match no %s of this output (any more)",
                key,
                getattr(cfg, key),
                left,
                lines,
                key[:-1],
            )
