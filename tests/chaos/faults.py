"""The faults of chaos and their moments. A moment is the n-th request of one kind to the store; the proxy holds it during the fault.

So a kill comes exactly before or after a commit, a file of a compaction or the manifest, on machines of any speed, and the
same seed strikes at the same requests. Knows processes and requests, and not how a round must end.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import psutil
from cgroup import put_into, tight_cgroup
from world import Job, Nodes

from capsfusion_ray.run.poison_rows import MAX_SHARED_DEATHS

ABSENT_S = 3.0  # until a lost node is replaced, and until a full disk is enlarged
STALL_S = 20.0  # engine.stall_s of every run: many times a step of the embedded model, even on a core shared with ten processes


@dataclass(frozen=True)
class Moment:
    """Requests of one kind. The fault strikes at the n-th, drawn from 1 to `up_to`: about as many as a run makes."""

    name: str
    operation: str
    path: str  # regular expression of the path below the output
    up_to: int = 1


PLAN = Moment("plan", "PutObject", "_run/plan-")
BEGIN = Moment("begin of a unit", "PutObject", "_run/attempts/", 12)
COMMIT = Moment("commit", "PutObject", "_units/", 20)
FILE = Moment("file of a compaction", "PutObject", "(data|rejected)/", 10)
ENTRY = Moment("entry of a compaction", "PutObject", "_run/groups/", 3)
PARTS_GO = Moment("removal of a part", "DeleteObject", "_units/", 20)
MANIFEST = Moment("manifest", "PutObject", "manifest.json")
REPORT = Moment("report", "PutObject", "report.html")
EDIT = Moment("begin of the edit", "PutObject", "_run/revision-")
RETRIED = Moment("commit of a retried unit", "PutObject", "_retry/.*_units/", 3)
EDITION = Moment("file of the new edition", "PutObject", "(data|rejected)/", 4)
NEW_ENTRY = Moment("entry of the new edition", "PutObject", "_run/groups/", 2)
OLD_GO = Moment("removal of an old file", "DeleteObject", "(data|rejected)/", 3)

IN_UNITS = (BEGIN, COMMIT)
IN_COMPACTION = (FILE, ENTRY, PARTS_GO)
IN_FUSE = (PLAN, *IN_UNITS, *IN_COMPACTION, MANIFEST, REPORT)
IN_RETRY = (EDIT, RETRIED, EDITION, NEW_ENTRY, MANIFEST, OLD_GO)
IN_TAKEDOWN = (EDIT, EDITION, NEW_ENTRY, MANIFEST, OLD_GO, REPORT)


class Stage(Protocol):
    """What a fault may reach: the main driver of the round, the nodes, and how to start another driver."""

    nodes: Nodes
    driver: Job

    def second_driver(self, *more: str) -> Job: ...


@dataclass(eq=False)
class Fault:
    """One fault that waits for its moment. `after`: it strikes after the request was carried out, else before; `struck`: what it did."""

    kind: str
    moment: Moment
    nth: int
    after: bool
    stage: Stage
    struck: str = ""
    mended: str = ""
    _seen: int = field(default=0, repr=False)

    @property
    def when(self) -> str:
        return f"{'after' if self.after else 'before'} {self.moment.name} {self.nth}"

    def is_due(self, request: Any, path: str, after: bool) -> bool:
        """Count this request if it is of the fault's kind; whether the fault must strike now."""
        if (
            self.struck
            or after != self.after
            or request.operation != self.moment.operation
            or not re.match(self.moment.path, path)
        ):
            return False
        self._seen += 1
        return self._seen >= self.nth

    def strike(self, pid: int) -> bool:
        """Strike; `pid` made the request. True: the request must be dropped. `struck` stays empty where there is nothing to hit."""
        raise NotImplementedError

    def mend(self) -> None:
        """What follows the strike, some seconds later; nothing by default."""


class DriverKilled(Fault):
    def strike(self, pid: int) -> bool:
        if self.stage.driver.poll() is not None:  # it has ended: the request is of its workers or of a second driver
            return False
        self.stage.driver.signal(signal.SIGKILL)
        self.struck = f"SIGKILL to the driver, pid {self.stage.driver.pid}"
        return pid == self.stage.driver.pid


class DriverTerminated(Fault):
    def strike(self, pid: int) -> bool:
        if self.stage.driver.poll() is None:
            self.stage.driver.signal(signal.SIGTERM)
            self.struck = f"SIGTERM to the driver, pid {self.stage.driver.pid}"
        return False


class WorkerKilled(Fault):
    """Kills the process that makes the request: an actor that begins a unit, or a task that commits or compacts."""

    def strike(self, pid: int) -> bool:
        if not pid or pid == self.stage.driver.pid:
            return False
        name = _name(pid)
        os.kill(pid, signal.SIGKILL)
        self.struck = f"SIGKILL to {name}, pid {pid}"
        return True


class NodeKilled(Fault):
    """Kills the node of the process that makes the request, with all its processes; another node joins some seconds later."""

    def strike(self, pid: int) -> bool:
        what = self.stage.nodes.kill(pid)
        self.struck = what and f"SIGKILL to {what}"
        return bool(what)

    def mend(self) -> None:
        time.sleep(ABSENT_S)
        self.mended = f"{self.stage.nodes.replenish()} new node"


class ActorStalled(Fault):
    """Stops an actor for longer than engine.stall_s while it fuses: its watchdog then finds a step that took too long."""

    _pid = 0

    def strike(self, pid: int) -> bool:
        if pid:
            self._pid, self.struck = pid, f"SIGSTOP to {_name(pid)}, pid {pid}"
        return False

    def mend(self) -> None:
        time.sleep(0.5)  # the unit reaches the engine
        try:
            actor = psutil.Process(self._pid)
            actor.suspend()
            time.sleep(1.3 * STALL_S)
            actor.resume()
            gone, _ = psutil.wait_procs([actor], timeout=STALL_S)
            self.mended = "ended as stalled" if gone else "it continued: no step was running"
        except psutil.NoSuchProcess:
            self.mended = "it had ended already"


class OutOfMemory(Fault):
    """Puts an actor into a cgroup without free memory: the kernel kills it at one of its next allocations."""

    _pid = 0

    def strike(self, pid: int) -> bool:
        if pid:
            cgroup = tight_cgroup()
            assert cgroup, "this fault is not drawn where no cgroup can be made"
            put_into(cgroup, pid)
            self._pid, self.struck = pid, f"no more memory for {_name(pid)}, pid {pid}"
        return False

    def mend(self) -> None:
        try:
            gone, _ = psutil.wait_procs([psutil.Process(self._pid)], timeout=20)
        except psutil.NoSuchProcess:
            gone = [None]
        self.mended = "killed by the kernel" if gone else "it needed no more memory"


class SecondDriver(Fault):
    """Starts another driver on the same output: it is refused, waits for the first, or takes over."""

    MODES = ("", "lease_wait_s=120", "takeover=true")
    mode = ""

    def strike(self, pid: int) -> bool:
        second = self.stage.second_driver(*filter(None, [self.mode]))
        self.struck = f"a second driver, pid {second.pid}, {self.mode or 'which must be refused'}"
        return False


class PoisonRow(Fault):
    """A row that kills each worker that gets it: SIGKILL to the actor that notes an attempt with this row.

    No row really kills the engine of the embedded model. The note of an attempt is written just before the engine gets
    the rows, and names them.
    """

    row = 0
    deaths = 0
    unit = ""

    def is_due(self, request: Any, path: str, after: bool) -> bool:
        if not after or request.operation != "PutObject" or not path.startswith(BEGIN.path):
            return False
        if not self.unit:
            if not super().is_due(request, path, after):
                return False
            rows = [last for _, last in json.loads(request.body)["ranges"]]
            if not rows or self.row >= max(rows):
                return False
            self.unit = path
        note = json.loads(request.body)
        tried_alone = note["trying"] is not None and note["trying"][0] <= self.row < note["trying"][1]
        return path == self.unit and (tried_alone or note["number"] <= MAX_SHARED_DEATHS)

    def strike(self, pid: int) -> bool:
        if pid:
            os.kill(pid, signal.SIGKILL)
            self.deaths += 1
            self.struck = f"row {self.row} of {self.unit.removeprefix(BEGIN.path)} kills every actor that gets it"
        return False

    @property
    def told(self) -> str:
        return f"{self.deaths} actors died because of it"


MOMENTS: dict[type[Fault], Sequence[Moment]] = {
    DriverKilled: IN_FUSE,
    DriverTerminated: IN_FUSE,
    WorkerKilled: (*IN_UNITS, *IN_COMPACTION),
    NodeKilled: (*IN_UNITS, *IN_COMPACTION),
    ActorStalled: (BEGIN,),
    OutOfMemory: (BEGIN,),
    SecondDriver: (PLAN, *IN_UNITS, *IN_COMPACTION, MANIFEST),
    PoisonRow: (BEGIN,),
}
POISON_ROWS = 6  # the poison row is one of the first so many that a unit sends to the engine


def draw(kind: str, of: type[Fault], chance: random.Random, stage: Stage, moments: Sequence[Moment] = ()) -> Fault:
    """Draw a fault of class `of`, at one of `moments` or of its own moments."""
    moment = chance.choice(moments or MOMENTS[of])
    # A fault of an actor must strike while it fuses: after it has noted its unit.
    after = True if moment is BEGIN and of is not DriverKilled else chance.random() < 0.5
    fault = of(kind, moment, chance.randint(1, moment.up_to), after, stage)
    if isinstance(fault, SecondDriver):
        fault.mode = chance.choice(SecondDriver.MODES)
    if isinstance(fault, PoisonRow):
        fault.row = chance.randrange(POISON_ROWS)
    return fault


def path_of(request: Any) -> str:
    """Bucket and key of a request, decoded."""
    return unquote(urlsplit(request.line.split()[1].decode()).path).lstrip("/")


def _name(pid: int) -> str:
    """The title that Ray gives the process: ray::MapWorker(MapBatches(FusionActor)), ray::_compact(), …"""
    try:
        return (psutil.Process(pid).cmdline() or ["?"])[0]
    except psutil.NoSuchProcess:
        return "?"
