"""One actor: a GPU (or CPU share), an engine loaded once, units in, rows out. Nothing heavy but the engine runs here."""

from __future__ import annotations

import dataclasses
import faulthandler
import logging
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.core.prompt import PromptBuilder
from capsfusion_ray.core.types import CaptionPair, FinishReason, Generation, Prompt
from capsfusion_ray.core.unit_batch import BUSY_S, DEVICE, ENGINE_S, UnitBatch, unit_in_traceback
from capsfusion_ray.core.unit_steps import waiting_pairs, with_generations
from capsfusion_ray.engines.base import Engine, build_engine, device_name
from capsfusion_ray.errors import CapsFusionError, ConfigError, EngineError, RowError
from capsfusion_ray.models.location import locate
from capsfusion_ray.run.engine_starts import StartLog
from capsfusion_ray.run.poison_rows import Attempt, AttemptLog

log = logging.getLogger(__name__)
EXIT_ENGINE_DEAD, EXIT_ENGINE_STALLED, EXIT_NODE_GOES, EXIT_NO_START = 70, 71, 72, 73  # from EX_SOFTWARE up
NOTICE_EVERY_S = 3.0  # a node is given 30 s by Ray, 30 to 120 s by a cloud
LEAVE_S = 3.0  # before its node goes an actor is away: with its notes in order, and what is finished handed to Ray
MAX_DEATHS = 60  # two poison rows of a unit of 10,000 take 32
DEBUT = 16  # captions by which a model is judged
STARTS_PER_PATIENCE = 30  # an engine that does not start is tried again so often, while the run stands still
REHEARSAL = CaptionPair("rehearsal", "lighthouse at dusk", "a lighthouse on a rock by the sea")


@dataclass(eq=False)
class _Request:
    """One unit's prompts on their way through the engine thread."""

    prompts: list[Prompt]
    generations: dict[str, Generation] = field(default_factory=dict)
    busy_s: float = 0.0  # of the engine's steps, by its share of the unfinished rows
    done: threading.Event = field(default_factory=threading.Event)
    stopped: CapsFusionError | None = None

    @property
    def left(self) -> int:
        return len(self.prompts) - len(self.generations)

    def stop(self, error: CapsFusionError) -> None:
        self.stopped = error
        self.done.set()


class _Company:
    """Units in flight share the engine, and a death of its process. A unit on trial has the engine to itself."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._taken = self._closed = False

    def close(self, timeout_s: float) -> bool:
        """No unit comes in any more; True once the last one is out, False after that time."""
        with self._changed:
            self._closed = True
            return self._changed.wait_for(lambda: not (self._inside or self._taken), max(timeout_s, 0.0))

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not (self._taken or self._closed))
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken)
            self._taken = True
            self._changed.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()


class _Debut:
    """A model's first captions. Where each of them fails alike, the fault is the model's, and rejecting row after row would hide it."""

    def __init__(self, model: str, decode: DecodeConfig) -> None:
        self._model, self._limit = model, decode.max_new_tokens
        self._first: list[Generation] = []

    def judge(self, finished: Sequence[Generation]) -> None:
        """Raises ConfigError for a model that wrote nothing; logs a warning for one that never stops."""
        if len(self._first) >= DEBUT or not finished:
            return
        self._first += finished
        if len(self._first) < DEBUT:
            return
        finishes = {generation.finish for generation in self._first}
        if finishes == {FinishReason.ERROR}:
            raise ConfigError(
                f"engine.model={self._model}: each of its first {len(self._first)} captions failed: {self._first[0].error}; try the other "
                "engine.dtype, or give another model"
            )
        if finishes == {FinishReason.LENGTH}:
            log.warning(
                "engine.model=%s: none of its first %d captions came to an end within decode.max_new_tokens=%d; is eos_token_id in its "
                "generation_config.json the token that it was trained to end with?",
                self._model,
                len(self._first),
                self._limit,
            )


def start_engine(engine: EngineConfig, decode: DecodeConfig, template: str) -> tuple[Engine, PromptBuilder]:
    """In a worker: the engine, its model found where this process runs, and what makes its prompts."""
    if engine.loads_model:
        engine = dataclasses.replace(engine, model=locate(engine.model))
    built = build_engine(engine, decode)
    return built, PromptBuilder(template, built.encode, engine.max_prompt_tokens)


class Monitor(Protocol):
    """Whoever wants to know how the engine fares; called by the engine's thread alone."""

    def stepped(self, seconds: float, engine: Engine, finished: list[Generation]) -> None: ...


class Notice(Protocol):
    """Whoever knows when this node will be taken away."""

    def left_s(self) -> float | None:
        """Seconds from now; None while it stays."""


class FusionActor:
    """The callable that Ray Data runs: a one-row batch holding a unit -> the same unit with its generations.

    Several calls run at once (one a unit in flight); a single thread drives the engine and refills its slots from all
    of them, so that slots never drain between units.
    """

    def __init__(
        self,
        engine: EngineConfig,
        decode: DecodeConfig,
        template: str,
        attempts: AttemptLog,
        monitor: Monitor | None = None,
        notice: Notice | None = None,
        starts: StartLog | None = None,
    ) -> None:
        logging.basicConfig(
            level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
        self._unusable: CapsFusionError | None = None
        self._step_began: float | None = None
        threading.Thread(target=self._watch, args=(engine.stall_s,), name="watchdog", daemon=True).start()
        try:
            if starts:
                starts.begin()
            self._engine, self._prompts = start_engine(engine, decode, template)
            if engine.loads_model:
                self._rehearse()
            if starts:
                starts.succeeded()
        except Exception as error:
            if starts and starts.failed(f"{type(error).__name__}: {error}"):
                _start_anew(error, engine.start_patience_s / STARTS_PER_PATIENCE)
            if not isinstance(error, CapsFusionError):
                raise
            # Raised here, it would reach the driver as the text of a traceback.
            self._unusable = type(error)(f"{error} (on {socket.gethostname()})")
            return
        self._encode_lock = threading.Lock()  # a fast tokenizer must not be entered by two threads at once
        self._requests: queue.SimpleQueue[_Request] = queue.SimpleQueue()
        self._device = f"{socket.gethostname()}:{device_name(engine)}"
        self._attempts = attempts
        self._monitor = monitor
        self._company = _Company()
        self._under_way: dict[str, Attempt] = {}  # by unit id, those that are noted
        self._debut = _Debut(locate(engine.model), decode) if engine.loads_model else None
        threading.Thread(target=self._drive, name="engine", daemon=True).start()
        if notice:
            threading.Thread(target=self._look_out, args=(notice,), name="notice", daemon=True).start()

    def _rehearse(self) -> None:
        """Write one caption: an engine whose every step fails (no compiler, no memory) has not started, and no unit is to blame."""
        for prompt in self._prompts.build([REHEARSAL]):
            if isinstance(prompt, Prompt):
                self._engine.submit([prompt])
        while self._engine.unfinished:
            self._step_began = time.monotonic()
            self._engine.step()
        self._step_began = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Fuse one unit. Every row that was waiting has a generation afterwards, or an error of its own.

        Raises EngineError for a unit whose worker died MAX_DEATHS times: then it is not a row that is at fault; and
        whatever kept the engine from starting.
        """
        if self._unusable:
            raise self._unusable
        unit = UnitBatch.unpack(batch)
        with unit_in_traceback(unit.unit):
            return self._written(unit).pack()

    def _written(self, unit: UnitBatch) -> UnitBatch:
        pairs, places = waiting_pairs(unit.table)
        began = time.monotonic()
        with self._encode_lock:
            built = self._prompts.build(pairs)
        prompts = [prompt for prompt in built if isinstance(prompt, Prompt)]
        written, busy_s = self._fuse(unit.unit.id, prompts) if prompts else ({}, 0.0)
        generations: dict[int, Generation] = {}
        for pair, prompt in zip(pairs, built, strict=True):
            if isinstance(prompt, RowError):
                generation = Generation(pair.row_id, "", FinishReason.ERROR, error=str(prompt))
            else:
                generation = written[prompt.id]
            for place in places[pair.raw, pair.synthetic]:
                generations[place] = generation
        spent = {ENGINE_S: round(time.monotonic() - began, 3), BUSY_S: round(busy_s, 3), DEVICE: self._device}
        return UnitBatch(unit.unit, with_generations(unit.table, generations), unit.apart, spent)

    def _fuse(self, unit_id: str, prompts: list[Prompt]) -> tuple[dict[str, Generation], float]:
        """By prompt id, and the engine's time for it. A unit that was in flight when its process died twice is tried alone, range by range."""
        with self._company.together():
            attempt = self._under_way[unit_id] = self._attempts.begin(unit_id, len(prompts))
            if attempt.number > MAX_DEATHS:
                raise EngineError(
                    f"unit {unit_id}: its worker died {MAX_DEATHS} times, whatever rows it was given; see the workers' logs, "
                    "and start the same command again once the cause is mended"
                )
            written, busy_s = ({}, 0.0) if attempt.alone else self._generate(prompts)
        if attempt.alone:
            with self._company.alone():
                log.warning("unit %s on trial: attempt %d, %d ranges", unit_id, attempt.number, len(attempt.ranges))
                for first, last in attempt.ranges:
                    self._attempts.note(unit_id, attempt.on((first, last)))
                    more, seconds = self._generate(prompts[first:last])
                    written, busy_s = written | more, busy_s + seconds
            for row in attempt.guilty:
                error = "the process that fused this row alone died, twice"
                written[prompts[row].id] = Generation(prompts[row].id, "", FinishReason.CRASH, error=error)
        self._attempts.end(unit_id)
        del self._under_way[unit_id]
        return written, busy_s

    def _generate(self, prompts: list[Prompt]) -> tuple[dict[str, Generation], float]:
        request = _Request(prompts)
        self._requests.put(request)
        request.done.wait()
        if request.stopped:
            raise request.stopped
        return request.generations, request.busy_s

    def _drive(self) -> None:
        """The engine thread: submit what has come, step, hand out what has finished."""
        owner: dict[str, _Request] = {}
        working: list[_Request] = []
        stopped: CapsFusionError | None = None
        try:
            while True:
                self._step_began = None
                while stopped or not self._engine.unfinished or not self._requests.empty():
                    request = self._requests.get()  # blocks only while the engine has nothing to do
                    if stopped:
                        request.stop(stopped)
                        continue
                    owner |= dict.fromkeys((prompt.id for prompt in request.prompts), request)
                    working.append(request)
                    self._engine.submit(request.prompts)
                self._step_began = time.monotonic()
                try:
                    finished = self._engine.step()
                    if self._debut:
                        self._debut.judge(finished)
                except EngineError:
                    raise
                except CapsFusionError as error:
                    # A refused key, a server that is gone, a cap that is reached, a model that writes nothing: no row and no
                    # process is at fault, and no other actor would fare better. The units raise it, and the run ends with it.
                    stopped, finished = error, []
                    for request in owner.values():
                        request.stop(error)
                    owner.clear()
                    working.clear()
                step_s = time.monotonic() - self._step_began
                share_out(step_s, working)
                if self._monitor:
                    self._monitor.stepped(step_s, self._engine, finished)
                for generation in finished:
                    request = owner.pop(generation.id)
                    request.generations[generation.id] = generation
                    if not request.left:
                        working.remove(request)
                        request.done.set()
        except BaseException:
            # A dead engine must end its process: Ray would send the retry to this same actor for ever. The rows in
            # flight are named, so that the one that kills engines can be found.
            log.exception("the engine died with %d rows in flight: %s", len(owner), sorted(owner)[:20])
            sys.stderr.flush()
            os._exit(EXIT_ENGINE_DEAD)

    def _watch(self, stall_s: float) -> None:
        """The watchdog thread: a step that hangs (a driver, a deadlock) would hold its units for ever."""
        while True:
            time.sleep(stall_s / 10)
            began = self._step_began
            if began is not None and time.monotonic() - began > stall_s:
                log.error(
                    "the engine stalled: one step takes longer than engine.stall_s=%g; all threads follow", stall_s
                )
                faulthandler.dump_traceback(sys.stderr)
                sys.stderr.flush()
                os._exit(EXIT_ENGINE_STALLED)

    def _look_out(self, notice: Notice) -> None:
        """The notice thread: on a node that goes, finish what can be finished and leave the rest as if it had not begun.

        Ray Data would send units to this actor until its node is gone, and each of them would count a death.
        """
        while (left_s := notice.left_s()) is None:
            time.sleep(NOTICE_EVERY_S)
        log.warning(
            "this node goes in %.0f s: no other unit begins here, %d are under way", left_s, len(self._under_way)
        )
        finished = self._company.close(left_s - 2 * LEAVE_S)
        if finished:
            time.sleep(LEAVE_S)  # for Ray to take the last unit's rows
        for unit_id, attempt in list(self._under_way.items()):
            self._attempts.abandon(unit_id, attempt)
        log.warning("leaving this node: %d units go elsewhere", len(self._under_way))
        sys.stderr.flush()
        os._exit(EXIT_NODE_GOES)


def share_out(step_s: float, requests: Sequence[_Request]) -> None:
    """A step's time, by unfinished rows: over the units it adds up to what the engine worked."""
    rows = sum(request.left for request in requests)
    for request in requests:
        request.busy_s += step_s * request.left / rows


def _start_anew(error: Exception, wait_s: float) -> None:
    """End this process after a while: what kept its engine from starting may be gone then, and what is broken in it is gone."""
    log.error(
        "%s cannot start its engine (%s: %s); others of this run can, and go on. It is tried again in %.0f s; otherwise mend this node, or take it out",
        socket.gethostname(),
        type(error).__name__,
        error,
        wait_s,
    )
    time.sleep(wait_s)
    sys.stderr.flush()
    os._exit(EXIT_NO_START)
