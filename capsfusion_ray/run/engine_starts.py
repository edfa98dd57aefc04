"""Whose fault it is that an engine does not start: the run's, until one of its engines is up; from then on its node's.

A node with a dead GPU, a full disk or no way to the hub must not end a run that goes well on the others: its actor tries
again, in a fresh process each time, for as long as the run moves. One note an actor, in the store; the rule is pure.
"""

from __future__ import annotations

import dataclasses
import socket
import time
from dataclasses import dataclass
from typing import Any

import ray

from capsfusion_ray.dataset.layout import ENGINE_IS_UP, PROGRESS, start_path
from capsfusion_ray.errors import EngineError
from capsfusion_ray.storage import Store, patiently, read_note, write_note

MOST_DEATHS = 4  # of processes in a row, each while its engine started, and none of the run is up


@dataclass(frozen=True)
class Start:
    """The `number`-th start in a row of one actor under one run. `since`: when the run was first seen to stand at `units_done`."""

    run: str  # a killed driver's starts are none of this run
    number: int
    units_done: int
    since: float
    host: str
    error: str = ""  # that it ended with; empty: its process died, or it goes on

    def seen(self, units_done: int, now: float) -> Start:
        """The same start, after a look at how far the run is."""
        return self if units_done == self.units_done else dataclasses.replace(self, units_done=units_done, since=now)

    def hopeful(self, up: bool, patience_s: float, now: float) -> bool:
        """Whether another start may fare better than this one did. `up`: an engine of the run is."""
        return up and now - self.since < patience_s


class StartLog:
    """The notes of one run. Made in the driver, used in the workers: `begin`, then `succeeded`, or `failed`."""

    def __init__(self, store: Store, run: str, patience_s: float) -> None:
        self._store, self._run, self._patience_s = store, run, patience_s

    def begin(self) -> None:
        """Note that an engine starts. Raises EngineError where this actor's process died of that, again and again."""
        before, up = self._mine(), self._up
        vain, died = before.number, bool(before.number and not before.error)
        self._note(dataclasses.replace(before, number=vain + 1, error=""))
        if died and not (before.hopeful(up, self._patience_s, time.time()) or (vain < MOST_DEATHS and not up)):
            raise EngineError(
                f"{before.host}: an engine did not start, {vain} times in a row, and the last time its process died of it (out of memory? a "
                "driver?); see the log of the workers, mend the node or take it out, and give the same command again"
            )

    def succeeded(self) -> None:
        """This actor's engine is up, and with it one of the run's."""
        if not self._up:
            self._put(ENGINE_IS_UP, {"run": self._run})
        patiently(lambda: self._store.delete([_path()]))

    def failed(self, error: str) -> bool:
        """Whether to start anew, in a fresh process: others are up, and the run moved within the patience."""
        start = self._note(dataclasses.replace(self._mine(), error=error))
        return start.hopeful(self._up, self._patience_s, time.time())

    @property
    def _up(self) -> bool:
        return self._get(ENGINE_IS_UP).get("run") == self._run

    def _mine(self) -> Start:
        """This actor's last start as it was noted, looked at now; number 0 where there is none of this run."""
        done, now, found = self._get(PROGRESS).get("units_done", 0), time.time(), self._get(_path())
        if found.get("run") != self._run:
            return Start(self._run, 0, done, now, socket.gethostname())
        return dataclasses.replace(Start(**found), host=socket.gethostname()).seen(done, now)

    def _note(self, start: Start) -> Start:
        self._put(_path(), dataclasses.asdict(start))
        return start

    def _get(self, path: str) -> dict[str, Any]:
        return patiently(lambda: read_note(self._store, path)) or {}

    def _put(self, path: str, fields: dict[str, Any]) -> None:
        patiently(lambda: write_note(self._store, path, fields))


def _path() -> str:
    """Of this actor: Ray keeps its id when it starts its process anew."""
    actor = ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None
    return start_path(actor or socket.gethostname())
