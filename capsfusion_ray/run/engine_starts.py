"""Decides whether an engine that does not start ends the run or is started again.

Until one engine of the run is up, a failed start is the run's fault (a wrong model, a missing library) and ends it. From
then on it is the fault of its node: a dead GPU, a full disk or no way to the hub must not end a run that works on the
other nodes. Its actor tries again, in a fresh process each time, as long as the run advances. There is one note per
actor, in the store. Knows no Ray.
"""

from __future__ import annotations

import dataclasses
import socket
import time
from dataclasses import dataclass
from typing import Any

from capsfusion_ray.dataset.layout import ENGINE_IS_UP, PROGRESS, start_path
from capsfusion_ray.errors import EngineError
from capsfusion_ray.storage import Store, patiently, read_note, write_note

MAX_START_DEATHS = 4  # of processes in a row, each while its engine started, and no engine of the run was up


@dataclass(frozen=True)
class Start:
    """The `number`-th start in a row of one actor under one run.

    `since` (Unix time): when `units_done`, the committed units of the run, were first seen at this value.
    """

    run: str  # a note of another run says nothing about this one
    number: int
    units_done: int
    since: float
    host: str
    error: str = ""  # how the start failed; empty: its process died, or it has not ended yet

    def seen(self, units_done: int, now: float) -> Start:
        """The same start, with `since` moved to `now` where the run has advanced."""
        return self if units_done == self.units_done else dataclasses.replace(self, units_done=units_done, since=now)

    def may_retry(self, up: bool, patience_s: float, now: float) -> bool:
        """Whether to start again: an engine of the run is up, and the run advanced less than `patience_s` ago."""
        return up and now - self.since < patience_s


class StartLog:
    """The notes of one run. Made in the driver, used in the actors: `begin`, then `succeeded` or `failed`.

    `actor`: the id of the actor, which stays the same when Ray restarts its process.
    """

    def __init__(self, store: Store, run: str, patience_s: float) -> None:
        self._store, self._run, self._patience_s = store, run, patience_s

    def begin(self, actor: str) -> None:
        """Note that an engine starts. Raises EngineError where the actor's processes died of it too often."""
        before, up = self._last(actor), self._up
        failed, died = before.number, bool(before.number and not before.error)
        self._note(actor, dataclasses.replace(before, number=failed + 1, error=""))
        may_retry = before.may_retry(up, self._patience_s, time.time()) or (failed < MAX_START_DEATHS and not up)
        if died and not may_retry:
            raise EngineError(
                f"{before.host}: an engine did not start, {failed} times in a row, and the last time its process died of it (out of memory? a "
                "driver?); see the log of the workers, mend the node or take it out, and give the same command again"
            )

    def succeeded(self, actor: str) -> None:
        """Note that an engine of the run is up, and delete the actor's own note."""
        if not self._up:
            self._put(ENGINE_IS_UP, {"run": self._run})
        patiently(lambda: self._store.delete([start_path(actor)]))

    def failed(self, actor: str, error: str) -> bool:
        """Note how the start failed; whether to start again in a fresh process."""
        start = self._note(actor, dataclasses.replace(self._last(actor), error=error))
        return start.may_retry(self._up, self._patience_s, time.time())

    @property
    def _up(self) -> bool:
        return self._get(ENGINE_IS_UP).get("run") == self._run

    def _last(self, actor: str) -> Start:
        """The actor's last start, as seen now; number 0 where it has none under this run."""
        done, now, found = self._get(PROGRESS).get("units_done", 0), time.time(), self._get(start_path(actor))
        if found.get("run") != self._run:
            return Start(self._run, 0, done, now, socket.gethostname())
        return dataclasses.replace(Start(**found), host=socket.gethostname()).seen(done, now)

    def _note(self, actor: str, start: Start) -> Start:
        self._put(start_path(actor), dataclasses.asdict(start))
        return start

    def _get(self, path: str) -> dict[str, Any]:
        return patiently(lambda: read_note(self._store, path)) or {}

    def _put(self, path: str, fields: dict[str, Any]) -> None:
        patiently(lambda: write_note(self._store, path, fields))
