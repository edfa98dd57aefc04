"""Starts the compaction of each group of input shards as soon as all its units are committed, beside the running stages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

from capsfusion_ray.config import OutputConfig
from capsfusion_ray.core.plan import Plan
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.dataset.manifest import GroupEntry
from capsfusion_ray.dataset.unit_files import remove_parts
from capsfusion_ray.run.executors.base import Executor, GroupTask
from capsfusion_ray.storage import Store

log = logging.getLogger(__name__)
MAX_RUNNING = 8  # each compaction holds one output file in memory
Key = tuple[int, str]  # the number of a plan and the name of a group


class Compactor:
    """Knows which units of which group are still to be committed.

    `stale`: units whose part is still there although their group has an entry, because a compaction was killed before its
    last step or a second attempt committed late; these parts are deleted first. `may_write` raises where this driver may
    no longer compact (dataset/lease.py).
    """

    def __init__(
        self,
        store: Store,
        plans: Sequence[Plan],
        entries: Sequence[GroupEntry],
        output: OutputConfig,
        stale: Collection[str],
        may_write: Callable[[], None],
        executor: Executor,
    ) -> None:
        self._store, self._output, self._may_write, self._executor = store, output, may_write, executor
        self._fields = plans[0].fields
        self._entries = {(entry.plan, entry.group): entry for entry in entries}
        self._units: dict[Key, list[WorkUnit]] = {}
        self._group_of: dict[str, Key] = {}
        for plan in plans:
            for unit in plan.units:
                self._units.setdefault((plan.number, unit.group), []).append(unit)
                self._group_of[unit.id] = (plan.number, unit.group)
        self._left = {
            key: {unit.id for unit in units} for key, units in self._units.items() if key not in self._entries
        }
        self._ready: list[Key] = []
        self._running: dict[Future[GroupEntry], Key] = {}
        self.done: set[str] = set()
        remove_parts(store, [unit for units in self._units.values() for unit in units if unit.id in stale])

    def committed(self, unit_id: str) -> None:
        """Note a commit; start the compaction of its group if it was the last unit, and collect finished ones."""
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
        """Wait for all groups; their entries, in the order of plan and group. Raises what a compaction raised."""
        while self._ready or self._running:
            self._advance(None)
        return [self._entries[key] for key in sorted(self._entries)]

    def _advance(self, timeout_s: float | None) -> None:
        """Start as many compactions as may run, then wait at most `timeout_s` for one to finish; None: without limit."""
        while self._ready and len(self._running) < MAX_RUNNING:
            self._may_write()
            number, group = key = self._ready.pop(0)
            units = tuple(self._units[key])
            task = GroupTask(self._store, group, number, units, self._fields, self._output)
            self._running[self._executor.compact(task)] = key
        if not self._running:
            return
        for future in wait(self._running, timeout_s, FIRST_COMPLETED).done:
            key = self._running.pop(future)
            self._entries[key] = future.result()
            log.debug("compacted %s: %d files", key, len(self._entries[key].files))
