"""Recompute the units of damaged or missing files from the input, and put them back into the dataset: repair=true.

A repair is a revision, as a retry is: its units are those of the damaged files, its parts lie apart under `_retry/`,
and the merge writes a new edition of each group that lost a file. It runs under the settings of the output alone.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from capsfusion_ray.config import OutputConfig
from capsfusion_ray.errors import AccountingError, ConfigError
from capsfusion_ray.lease import Lease
from capsfusion_ray.manifest import MANIFEST, Counts, Manifest, read_groups
from capsfusion_ray.parts import committed, read_summaries
from capsfusion_ray.pipeline import Job, Pool, run_units
from capsfusion_ray.plan import Plan
from capsfusion_ray.progress import Progress
from capsfusion_ray.retry import RETRY_DIR, clean
from capsfusion_ray.rewrite import Rewriter, begin, begun, publish
from capsfusion_ray.rows import WorkUnit
from capsfusion_ray.sources import Shard
from capsfusion_ray.storage import Store
from capsfusion_ray.verify import damage

log = logging.getLogger(__name__)
KIND = "repair"


@dataclass(frozen=True)
class Repair:
    """One repair of one finished output. `files`: the paths of the damaged ones."""

    store: Store
    plans: Sequence[Plan]
    manifest: Manifest
    etag: str
    edition: int
    files: frozenset[str]
    output: OutputConfig

    @property
    def parts(self) -> Store:
        """Where the recomputed units' parts lie; gone once they are merged."""
        return Store(f"{self.store.root}/{RETRY_DIR}/e{self.edition:03d}", self.store.options)

    @property
    def units(self) -> list[WorkUnit]:
        lost = {unit_id for file in self.manifest.files if file.path in self.files for unit_id, _ in file.units}
        return [unit for plan in self.plans for unit in plan.units if unit.id in lost]

    @property
    def rows(self) -> int:
        return sum(unit.rows for unit in self.units)


def open_repair(store: Store, plans: Sequence[Plan], output: OutputConfig) -> Repair | None:
    """The repair to do, noted as begun; None where every file is as the manifest says. Reads all files.

    Raises ConfigError for an output that is not finished, that another revision was begun on, or whose lost rows
    include some that a takedown removed: recomputing would bring them back.
    """
    found = store.get_with_etag(MANIFEST)
    if found is None:
        raise ConfigError(f"output.path={store.root}: repair=true needs a finished output; run the command without it first")
    manifest, etag = Manifest.from_bytes(found[0]), found[1]
    unfinished = begun(store, manifest)
    if unfinished and unfinished["kind"] == KIND:
        damaged = dict.fromkeys(unfinished["files"], "noted by the repair that was begun")
    else:
        damaged = damage(store, manifest.files)
        if not damaged:
            clean(store, manifest)  # a repair may have been killed after its manifest
            return None
    for path, what in damaged.items():
        log.warning("%s: %s", path, what)
    lost = {unit_id for file in manifest.files if file.path in damaged for unit_id, _ in file.units}
    taken = [unit.id for unit in manifest.units if unit.id in lost and unit.removed]
    if taken:
        raise ConfigError(
            f"{store.root}: {len(taken)} damaged units (first {taken[0]}) had rows taken down, and a repair would bring them back; "
            f"restore {sorted(damaged)[0]} from a copy, or fuse into a new output and take the rows down there"
        )
    edition = begin(store, manifest, {"kind": KIND, "files": sorted(damaged)})
    return Repair(store, plans, manifest, etag, edition, frozenset(damaged), output)


def run_repair(repair: Repair, job: Job, pool: Pool, shards: Mapping[str, Shard], lease: Lease) -> Counts:
    """Fuse the lost units again, merge group by group, publish, sweep. The new totals."""
    began = time.monotonic()
    job = dataclasses.replace(job, output=repair.parts)
    done = committed(repair.parts)
    pending = [unit for unit in repair.units if unit.id not in done]
    log.info("repair: %d rows in %d units of %d files, %d units left", repair.rows, len(repair.units), len(repair.files), len(pending))
    with Progress(repair.parts, repair.rows, len(repair.units), pool.max_actors, sys.stderr) as progress:
        for summary in read_summaries(repair.parts, [unit for unit in repair.units if unit.id in done]):
            progress.resumed(summary)
        for summary in run_units(job, pool, pending, dict(shards)) if pending else ():
            progress.committed(summary)
    missing = {unit.id for unit in pending} - committed(repair.parts)
    if missing:
        raise AccountingError(f"{len(missing)} units of the repair ended without a commit; run the same command again")
    rewriter = Rewriter(repair.store, repair.edition, repair.plans[0].fields, repair.output)
    for entry in read_groups(repair.store):
        held = {unit.id for unit in entry.units}
        units = [unit for unit in repair.units if unit.id in held]
        if units and entry.edition != repair.edition:
            lease.check()
            rewriter.replace(entry, repair.parts, units)
    lease.check()
    record = {"revision": repair.edition, "kind": KIND, "files": sorted(repair.files), "seconds": round(time.monotonic() - began, 1)}
    manifest = publish(repair.store, repair.manifest, repair.etag, record)
    clean(repair.store, manifest)
    return manifest.counts
