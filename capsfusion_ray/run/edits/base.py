"""An edit of a finished output by fusing again: the retry (retry_rejected.py) and the repair (repair_files.py).

Some rows are fused again, apart from the dataset: their parts are under `_retry/`. Then each group that holds such rows
gets a new edition. No other file is touched and no row is renumbered. A killed edit is finished by the same command.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from capsfusion_ray.config import GateConfig, OutputConfig
from capsfusion_ray.core.accounting import Counts, UnitSummary
from capsfusion_ray.core.plan import Plan
from capsfusion_ray.core.repeated_captions import REPEATED, Repeated, repeated
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.dataset.editions import clean, publish
from capsfusion_ray.dataset.lease import Lease
from capsfusion_ray.dataset.manifest import GroupEntry, Manifest, read_groups
from capsfusion_ray.dataset.rewriter import THREADS, Rewriter
from capsfusion_ray.dataset.unit_files import committed, parts_of, read_summaries
from capsfusion_ray.errors import AccountingError
from capsfusion_ray.run.executors.base import Executor
from capsfusion_ray.run.pool import Pool
from capsfusion_ray.run.progress import Progress
from capsfusion_ray.run.stages import Job, UnitReads
from capsfusion_ray.storage import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Edit(ABC):
    """One edit that was begun on one finished output. `record`: its kind and its settings, as they were noted then."""

    store: Store
    plans: Sequence[Plan]
    manifest: Manifest
    edition: int
    output: OutputConfig
    record: dict[str, Any]

    @property
    @abstractmethod
    def unit_rows(self) -> dict[str, int]:
        """Unit id -> how many of its rows, at most, are fused again."""

    @abstractmethod
    def reads(self, entries: Sequence[GroupEntry], units: Sequence[WorkUnit]) -> list[UnitReads]:
        """The read tasks of the rows of `units` that are fused again. `entries`: of all groups."""

    @abstractmethod
    def merge(self, entry: GroupEntry, units: Sequence[WorkUnit], repeated: Repeated) -> GroupEntry:
        """Write a new edition of one group. `units`: those that were fused again; `repeated`: captions to mark, see mark_repeated."""

    def repeats(self, entry: GroupEntry, units: Sequence[WorkUnit]) -> dict[str, int]:
        """The most repeated captions that the group will have. Rows that are recomputed get the captions that they had."""
        return entry.repeats

    def fused(self, parts: Sequence[UnitSummary]) -> int:
        """How many rows of the whole output will have a caption that an engine wrote, those marked as repeated included."""
        counts = self.manifest.counts
        return counts.fused + counts.reasons.get(REPEATED, 0)

    @property
    def parts(self) -> Store:
        """Where the parts of the edit are, until they are merged."""
        return parts_of(self.store, self.edition)

    @property
    def units(self) -> list[WorkUnit]:
        held = self.unit_rows
        return [unit for plan in self.plans for unit in plan.units if unit.id in held]

    @property
    def rows(self) -> int:
        return sum(self.unit_rows.values())

    @property
    def rewriter(self) -> Rewriter:
        return Rewriter(self.store, self.edition, self.plans[0].fields, self.output)


def run_edit(edit: Edit, job: Job, executor: Executor, pool: Pool, lease: Lease) -> Counts:
    """Fuse what is not fused yet, merge group by group, publish the manifest, delete the parts. The new counts.

    Raises AccountingError where units end without a commit, and what the stages raise.
    """
    began = time.monotonic()
    job = dataclasses.replace(job, output=edit.parts)
    units, done = edit.units, committed(edit.parts)
    pending = [unit for unit in units if unit.id not in done]
    kind = edit.record["kind"]
    log.info("%s: up to %d rows in %d units, %d units left", kind, edit.rows, len(units), len(pending))
    entries = read_groups(edit.store)
    with Progress(edit.parts, edit.rows, len(units), pool.max_actors, sys.stderr) as progress:
        for summary in read_summaries(edit.parts, [unit for unit in units if unit.id in done]):
            progress.resumed(summary)
        for summary in executor.fuse(job, pool, edit.reads(entries, pending)) if pending else ():
            progress.committed(summary)
    missing = {unit.id for unit in pending} - committed(edit.parts)
    if missing:
        raise AccountingError(f"{len(missing)} units of the {kind} ended without a commit; run the same command again")
    _merge(edit, entries, job.gates.repeated_caption, lease)
    lease.check()
    record = {"revision": edit.edition, **edit.record, "seconds": round(time.monotonic() - began, 1)}
    manifest = publish(edit.store, edit.manifest, record)
    clean(edit.store, manifest)
    return manifest.counts


def _merge(edit: Edit, entries: Sequence[GroupEntry], gate: GateConfig, lease: Lease) -> None:
    """Merge the groups that are not merged yet. New captions are judged against the whole output; old ones stay as they are.

    All that is judged follows from parts, manifest and entries, which a kill leaves as they are: merging again writes the same.
    """
    units = {unit.id: unit for unit in edit.units}
    again = {entry.path: [units[held.id] for held in entry.units if held.id in units] for entry in entries}

    def with_new_repeats(entry: GroupEntry) -> GroupEntry:
        unmerged = again[entry.path] and entry.edition != edit.edition
        return dataclasses.replace(entry, repeats=edit.repeats(entry, again[entry.path])) if unmerged else entry

    with ThreadPoolExecutor(THREADS) as threads:
        entries = list(threads.map(with_new_repeats, entries))
    fused = edit.fused(read_summaries(edit.parts, edit.units))
    captions = {} if gate.action == "ignore" else repeated((entry.repeats for entry in entries), fused, gate.threshold)
    for entry in entries:
        if again[entry.path] and entry.edition != edit.edition:
            lease.check()
            edit.merge(entry, again[entry.path], Repeated(captions, gate.action == "reject"))
