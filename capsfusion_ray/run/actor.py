"""The fusion actor under Ray: one unit in, the same unit with its captions out. Nothing heavy but the engine runs in its process.

This file decides when the process exits: Ray Data sends the retry of a failed unit to the same actor, so an actor whose
engine is dead, stalled or not started must end its process to be replaced.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import NoReturn, Protocol

import pyarrow as pa
import ray

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.core.unit_batch import UnitBatch, unit_in_traceback
from capsfusion_ray.errors import CapsFusionError
from capsfusion_ray.run.engine_loop import BuildEngine, Failure, Monitor
from capsfusion_ray.run.engine_starts import StartLog
from capsfusion_ray.run.poison_rows import AttemptLog, PoisonRowSearch
from capsfusion_ray.run.unit_fuser import UnitFuser, start_loop

log = logging.getLogger(__name__)
# Exit codes: sysexits.h begins at 64, and 70 is its EX_SOFTWARE.
EXIT_ENGINE_DEAD, EXIT_ENGINE_STALLED, EXIT_NODE_LEAVES, EXIT_NO_START = 70, 71, 72, 73
NOTICE_EVERY_S = 3.0  # Ray gives a node 30 s, a cloud gives it 30 to 120 s
LEAVE_S = 3.0  # before its node leaves, an actor needs this long to write its notes and to hand finished units to Ray
STARTS_PER_PATIENCE = 30  # starts of an engine within engine.start_patience_s, while the run does not advance


class Notice(Protocol):
    """Knows when this node will be taken away."""

    def left_s(self) -> float | None:
        """Seconds from now; None while the node stays."""


@dataclass(frozen=True)
class ActorTools:
    """What an actor uses beside its engine; made in the driver. What is None is left out, as in tests without Ray."""

    attempts: AttemptLog
    starts: StartLog | None = None
    monitor: Monitor | None = None
    notice: Notice | None = None
    build: BuildEngine | None = None  # constructs the engine; None: the one of engine.kind


class FusionActor:
    """The callable that Ray Data runs: a one-row batch that holds a unit -> the same unit with its generations.

    Several calls run at once, one per unit in flight; all of them share one engine loop.
    """

    def __init__(self, engine: EngineConfig, decode: DecodeConfig, template: str, tools: ActorTools) -> None:
        logging.basicConfig(
            level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
        self._unusable: CapsFusionError | None = None
        starts, actor = tools.starts, _actor_id()
        try:
            if starts:
                starts.begin(actor)
            loop, prompts = start_loop(engine, decode, template, tools.monitor, _exit_on_failure, tools.build)
            if starts:
                starts.succeeded(actor)
        except Exception as error:
            if starts and starts.failed(actor, f"{type(error).__name__}: {error}"):
                _restart(error, engine.start_patience_s / STARTS_PER_PATIENCE)
            if not isinstance(error, CapsFusionError):
                raise
            # The first unit raises it: raised here, it would reach the driver as the text of a traceback.
            self._unusable = type(error)(f"{error} (on {socket.gethostname()})")
            return
        self._search = PoisonRowSearch(tools.attempts, loop.generate)
        self._fuser = UnitFuser(engine, prompts, self._search.generate)
        if tools.notice:
            threading.Thread(target=self._watch_node, args=(tools.notice,), name="notice", daemon=True).start()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Fuse one unit. Every row that waited has a generation afterwards, or an error of its own.

        Raises what kept the engine from starting, and EngineError for a unit whose workers died too often.
        """
        if self._unusable:
            raise self._unusable
        unit = UnitBatch.unpack(batch)
        with unit_in_traceback(unit.unit):
            return self._fuser.fuse(unit).pack()

    def _watch_node(self, notice: Notice) -> None:
        """The notice thread: before its node leaves, the actor finishes the units that it can and gives up the others.

        Ray Data would send units to this actor until the node is gone, and each of them would count as a death.
        """
        while (left_s := notice.left_s()) is None:
            time.sleep(NOTICE_EVERY_S)
        log.warning(
            "this node leaves in %.0f s: no further unit begins here, %d are under way",
            left_s,
            len(self._search.under_way),
        )
        if self._search.close(left_s - 2 * LEAVE_S):
            time.sleep(LEAVE_S)  # for Ray to take the rows of the last unit
        log.warning("this actor ends before its node: %d units are fused elsewhere", self._search.abandon())
        _exit(EXIT_NODE_LEAVES)


def _exit_on_failure(failure: Failure) -> None:
    _exit(EXIT_ENGINE_DEAD if failure == "dead" else EXIT_ENGINE_STALLED)


def _restart(error: Exception, wait_s: float) -> NoReturn:
    """Wait, then end this process: what kept its engine from starting may be gone when Ray starts the next one."""
    log.error(
        "%s cannot start its engine (%s: %s); other engines of this run are up and continue. It is tried again in %.0f s; if "
        "that does not help, repair this node or take it out",
        socket.gethostname(),
        type(error).__name__,
        error,
        wait_s,
    )
    time.sleep(wait_s)
    _exit(EXIT_NO_START)


def _exit(code: int) -> NoReturn:
    sys.stderr.flush()
    os._exit(code)


def _actor_id() -> str:
    """The id of this actor, which Ray keeps when it restarts its process; without Ray the name of this host."""
    actor = ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None
    return actor or socket.gethostname()
