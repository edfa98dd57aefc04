"""Recompute the units of damaged or missing files from the input, and put them back into the dataset: repair=true.

It runs under the settings with which the output was made, and under no others.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from capsfusion_ray.config import OutputConfig
from capsfusion_ray.core.plan import Plan, refuse_lost_input
from capsfusion_ray.core.repeated_captions import Repeated
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.dataset.damage import damage
from capsfusion_ray.dataset.edit_record import begin_edit, unfinished_edit
from capsfusion_ray.dataset.editions import clean
from capsfusion_ray.dataset.manifest import GroupEntry, read_finished
from capsfusion_ray.dataset.replace_units import replace_units
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.run.edits.base import Edit
from capsfusion_ray.run.stages import UnitReads, shard_reads
from capsfusion_ray.sources import Shard
from capsfusion_ray.storage import Store

log = logging.getLogger(__name__)
KIND = "repair"


@dataclass(frozen=True)
class Repair(Edit):
    """One repair. `lost`: the units of the damaged files; `shards`: the input."""

    lost: tuple[WorkUnit, ...]
    shards: Sequence[Shard]

    @property
    def unit_rows(self) -> dict[str, int]:
        return {unit.id: unit.rows for unit in self.lost}

    def reads(self, entries: Sequence[GroupEntry], units: Sequence[WorkUnit]) -> list[UnitReads]:
        return shard_reads(units, self.shards)

    def merge(self, entry: GroupEntry, units: Sequence[WorkUnit], repeated: Repeated) -> GroupEntry:
        return replace_units(self.rewriter, entry, self.parts, units, repeated)


def open_repair(store: Store, plans: Sequence[Plan], output: OutputConfig, shards: Sequence[Shard]) -> Repair | None:
    """Read all files, and note that a repair is begun; None where every file is as the manifest says.

    Raises ConfigError for an output that is not finished, that another edit was begun on, or whose damaged units had rows
    taken down: recomputing would bring these back. Raises SourceError where the input is gone.
    """
    manifest = read_finished(store, "repair=true")
    unfinished = unfinished_edit(store, manifest)
    if unfinished and unfinished["kind"] == KIND:
        damaged = dict.fromkeys(unfinished["files"], "noted when this repair was begun")
    else:
        damaged = damage(store, manifest.files)
        if not damaged:
            clean(store, manifest)  # a repair may have been killed after it published the manifest
            return None
    for path, what in damaged.items():
        log.warning("%s: %s", path, what)
    ids = {unit_id for file in manifest.files if file.path in damaged for unit_id, _ in file.units}
    lost = tuple(unit for plan in plans for unit in plan.units if unit.id in ids)
    refuse_lost_input(lost, shards)
    taken = [unit.id for unit in manifest.units if unit.id in ids and unit.removed]
    if taken:
        raise ConfigError(
            f"{store.root}: {len(taken)} damaged units (first {taken[0]}) had rows taken down, and a repair would bring them back; "
            f"restore {sorted(damaged)[0]} from a copy, or fuse into a new output and take the rows down there"
        )
    record = {"kind": KIND, "files": sorted(damaged)}
    edition = begin_edit(store, manifest, record)
    return Repair(store, plans, manifest, edition, output, record, lost, shards)
