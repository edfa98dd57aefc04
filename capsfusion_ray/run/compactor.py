"""Compacts each group of input shards as a Ray task, as soon as all its units are committed, beside the running pipeline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence

import ray

from capsfusion_ray.config import OutputConfig
from capsfusion_ray.core.plan import Plan
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.dataset.compaction import compact_group
from capsfusion_ray.dataset.manifest import GroupEntry
from capsfusion_ray.dataset.unit_files import remove_parts
from capsfusion_ray.run.pipeline import as_raised
from capsfusion_ray.storage import Store, patiently

log = logging.getLogger(__name__)
COMPACT_CPUS = 0.2
MAX_RUNNING = 8  # each holds one output file in memory


class Compactor:
    """Knows which units of which group are still to come. Use as a context: leaving it waits for no task.

    `stale`: units whose part outlived their group's entry, because a compaction was killed before its last step or a
    second attempt came late; these parts go first. `may_write` raises where this driver may no longer compact: see lease.py.
    """

    def __init__(
        self,
        store: Store,
        plans: Sequence[Plan],
        entries: Sequence[GroupEntry],
        output: OutputConfig,
        stale: Collection[str],
        may_write: Callable[[], None],
    ) -> None:
        self._store, self._output, self._stale, self._may_write = store, output, stale, may_write
        self._fields = plans[0].fields
        self._entries = {(entry.plan, entry.group): entry for entry in entries}
        self._units: dict[tuple[int, str], list[WorkUnit]] = {}
        self._group_of: dict[str, tuple[int, str]] = {}
        for plan in plans:
            for unit in plan.units:
                self._units.setdefault((plan.number, unit.group), []).append(unit)
                self._group_of[unit.id] = (plan.number, unit.group)
        self._left = {
            key: {unit.id for unit in units} for key, units in self._units.items() if key not in self._entries
        }
        self._ready: list[tuple[int, str]] = []
        self._running: dict[ray.ObjectRef, tuple[int, str]] = {}
        self.done: set[str] = set()

    def __enter__(self) -> Compactor:
        remove_parts(self._store, [unit for units in self._units.values() for unit in units if unit.id in self._stale])
        return self

    def __exit__(self, *_: object) -> None:
        for task in self._running:
            ray.cancel(task)

    def committed(self, unit_id: str) -> None:
        """Note a commit; starts the compaction of its group if it was the last, and collects finished ones."""
        self.done.add(unit_id)
        key = self._group_of[unit_id]
        if key not in self._left:
            return
        self._left[key].discard(unit_id)
        if not self._left[key]:
            del self._left[key]
            self._ready.append(key)
        self._advance(0.0)

    def finish(self) -> list[GroupEntry]:
        """Wait for all groups; their entries, in order of revision and group."""
        while self._ready or self._running:
            self._advance(None)
        return [self._entries[key] for key in sorted(self._entries)]

    def _advance(self, timeout_s: float | None) -> None:
        while self._ready and len(self._running) < MAX_RUNNING:
            self._may_write()
            key = self._ready.pop(0)
            revision, group = key
            task = _compact.remote(self._store, group, revision, self._units[key], self._fields, self._output)
            self._running[task] = key
        if not self._running:
            return
        finished, _ = ray.wait(list(self._running), timeout=timeout_s)
        for task in finished:
            key = self._running.pop(task)
            with as_raised():
                self._entries[key] = ray.get(task)
            log.debug("compacted %s: %d files", key, len(self._entries[key].files))


@ray.remote(num_cpus=COMPACT_CPUS)
def _compact(
    store: Store,
    group: str,
    revision: int,
    units: list[WorkUnit],
    fields: tuple[tuple[str, str], ...],
    output: OutputConfig,
) -> GroupEntry:
    return patiently(lambda: compact_group(store, group, revision, units, fields, output))
