"""A revision of a finished output: some rows fused again, apart, then merged group by group. See retry.py and repair.py.

Its parts lie under `_retry/`, and the merge writes a new edition of each group that it changes. No other file is
touched and no row is renumbered. A killed revision is finished by the same command.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
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
from capsfusion_ray.run.pipeline import Job, Pool
from capsfusion_ray.run.progress import Progress
from capsfusion_ray.storage import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Revision(ABC):
    """One revision that was begun on one finished output. `record`: what was noted then, its kind and its settings."""

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
    def fuse(
        self, job: Job, pool: Pool, entries: Sequence[GroupEntry], units: Sequence[WorkUnit]
    ) -> Iterable[UnitSummary]:
        """Fuse the rows of `units` and commit them to `job.output`; the summary of each as it is committed."""

    @abstractmethod
    def merge(self, entry: GroupEntry, units: Sequence[WorkUnit], repeated: Repeated) -> GroupEntry:
        """Write a new edition of one group, of which `units` were fused again; see Rewriter for `repeated`."""

    def repeats(self, entry: GroupEntry, units: Sequence[WorkUnit]) -> dict[str, int]:
        """The most repeated captions that one group will note. Recomputed units get the captions that they had."""
        return entry.repeats

    def fused(self, parts: Sequence[UnitSummary]) -> int:
        """How many rows of the whole output will have a caption that an engine wrote, marked ones among them."""
        counts = self.manifest.counts
        return counts.fused + counts.reasons.get(REPEATED, 0)

    @property
    def parts(self) -> Store:
        """Where the units' parts lie; gone once they are merged."""
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


def run_revision(revision: Revision, job: Job, pool: Pool, lease: Lease) -> Counts:
    """Fuse what is left of it, merge group by group, publish, sweep. The new totals."""
    began = time.monotonic()
    job = dataclasses.replace(job, output=revision.parts)
    units, done = revision.units, committed(revision.parts)
    pending = [unit for unit in units if unit.id not in done]
    kind = revision.record["kind"]
    log.info("%s: up to %d rows in %d units, %d units left", kind, revision.rows, len(units), len(pending))
    entries = read_groups(revision.store)
    with Progress(revision.parts, revision.rows, len(units), pool.max_actors, sys.stderr) as progress:
        for summary in read_summaries(revision.parts, [unit for unit in units if unit.id in done]):
            progress.resumed(summary)
        for summary in revision.fuse(job, pool, entries, pending) if pending else ():
            progress.committed(summary)
    missing = {unit.id for unit in pending} - committed(revision.parts)
    if missing:
        raise AccountingError(f"{len(missing)} units of the {kind} ended without a commit; run the same command again")
    _merge(revision, entries, job.gates.repeated_caption, lease)
    lease.check()
    record = {"revision": revision.edition, **revision.record, "seconds": round(time.monotonic() - began, 1)}
    manifest = publish(revision.store, revision.manifest, record)
    clean(revision.store, manifest)
    return manifest.counts


def _merge(revision: Revision, entries: Sequence[GroupEntry], gate: GateConfig, lease: Lease) -> None:
    """Merge what is not merged yet. What it brings is judged against the whole output; what stood there stays as it is.

    All that is judged follows from parts, manifest and entries that a kill leaves as they are: a repeated merge is the same.
    """
    units = {unit.id: unit for unit in revision.units}
    mine = {entry.path: [units[held.id] for held in entry.units if held.id in units] for entry in entries}

    def noted(entry: GroupEntry) -> GroupEntry:
        unmerged = mine[entry.path] and entry.edition != revision.edition
        return dataclasses.replace(entry, repeats=revision.repeats(entry, mine[entry.path])) if unmerged else entry

    with ThreadPoolExecutor(THREADS) as pool:
        entries = list(pool.map(noted, entries))
    fused = revision.fused(read_summaries(revision.parts, revision.units))
    captions = {} if gate.action == "ignore" else repeated((entry.repeats for entry in entries), fused, gate.threshold)
    for entry in entries:
        if mine[entry.path] and entry.edition != revision.edition:
            lease.check()
            revision.merge(entry, mine[entry.path], Repeated(captions, gate.action == "reject"))
