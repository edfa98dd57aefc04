"""One thread that drives one engine for several units at once, so that the engine's slots never drain between units.

Knows no Ray, no store and no process: what a dead or stalled engine means is decided by `on_failure` (see actor.py).
"""

from __future__ import annotations

import dataclasses
import faulthandler
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, Protocol

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.core.prompt import PromptBuilder
from capsfusion_ray.core.types import CaptionPair, FinishReason, Generation, Prompt
from capsfusion_ray.engines.base import Engine, build_engine
from capsfusion_ray.errors import CapsFusionError, ConfigError, EngineError
from capsfusion_ray.models.location import locate

log = logging.getLogger(__name__)
FIRST_CAPTIONS = 16  # enough to tell a model that writes nothing from a few bad rows
TRIAL_PAIR = CaptionPair("trial", "lighthouse at dusk", "a lighthouse on a rock by the sea")
STOP_S = 30.0  # the longest wait for the engine's thread to end: it looks between two steps
Failure = Literal["dead", "stalled"]
BuildEngine = Callable[[EngineConfig, DecodeConfig], Engine]


class Monitor(Protocol):
    """Is told of every step of the engine, by the engine's thread alone."""

    def stepped(self, seconds: float, engine: Engine, finished: list[Generation]) -> None: ...


def start_engine(
    engine: EngineConfig, decode: DecodeConfig, template: str, build: BuildEngine | None = None
) -> tuple[Engine, PromptBuilder]:
    """Load the engine, its model from this machine's disk, and make the builder of its prompts.

    `build` constructs the engine; None: the one of `engine.kind`. Raises what the engine's construction raises.
    """
    if engine.loads_model:
        engine = dataclasses.replace(engine, model=locate(engine.model))
    built = (build or build_engine)(engine, decode)
    return built, PromptBuilder(template, built.encode, engine.max_prompt_tokens)


class FirstCaptionsCheck:
    """Judges a model by its first captions: where all of them fail alike the model is at fault, not the rows."""

    def __init__(self, model: str, decode: DecodeConfig) -> None:
        self._model, self._limit = model, decode.max_new_tokens
        self._seen: list[Generation] = []

    def judge(self, finished: Sequence[Generation]) -> None:
        """Raises ConfigError for a model that wrote no caption; logs a warning for one whose captions never end."""
        if len(self._seen) >= FIRST_CAPTIONS or not finished:
            return
        self._seen += finished
        if len(self._seen) < FIRST_CAPTIONS:
            return
        finishes = {generation.finish for generation in self._seen}
        if finishes == {FinishReason.ERROR}:
            raise ConfigError(
                f"engine.model={self._model}: each of its first {len(self._seen)} captions failed: {self._seen[0].error}; try the other "
                "engine.dtype, or give another model"
            )
        if finishes == {FinishReason.LENGTH}:
            log.warning(
                "engine.model=%s: none of its first %d captions came to an end within decode.max_new_tokens=%d; check that eos_token_id "
                "in its generation_config.json is the token that it was trained to end with",
                self._model,
                len(self._seen),
                self._limit,
            )


@dataclass(eq=False)
class Request:
    """The prompts of one unit on their way through the engine's thread."""

    prompts: list[Prompt]
    generations: dict[str, Generation] = field(default_factory=dict)
    busy_s: float = 0.0  # the unit's share of the time of the engine's steps
    done: threading.Event = field(default_factory=threading.Event)
    error: CapsFusionError | None = None

    @property
    def left(self) -> int:
        return len(self.prompts) - len(self.generations)

    def fail(self, error: CapsFusionError) -> None:
        self.error = error
        self.done.set()


def share_step(step_s: float, requests: Sequence[Request]) -> None:
    """Divide the seconds of one step among the units, by their unfinished rows: the shares add up to what the engine worked."""
    rows = sum(request.left for request in requests)
    for request in requests:
        request.busy_s += step_s * request.left / rows


class EngineLoop:
    """Drives `engine` in a thread of its own; `generate` may be called from several threads at once.

    `stall_s`: a step that takes longer counts as stalled. `on_failure` is called with what happened when the engine dies
    (an error that is not ours, or an EngineError) or stalls; if it returns, all units raise an EngineError.
    """

    def __init__(
        self,
        engine: Engine,
        stall_s: float,
        monitor: Monitor | None = None,
        check: FirstCaptionsCheck | None = None,
        on_failure: Callable[[Failure], None] = lambda failure: None,
    ) -> None:
        self._engine, self._stall_s, self._monitor, self._check = engine, stall_s, monitor, check
        self._on_failure = on_failure
        self._queued: queue.SimpleQueue[Request | None] = queue.SimpleQueue()  # None: wake up, the loop is to end
        self._owner: dict[str, Request] = {}  # by the id of each unfinished prompt
        self._working: list[Request] = []
        self._error: CapsFusionError | None = None  # set once the loop serves nobody any more
        self._step_began: float | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watchdog.start()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, trial: Sequence[Prompt] = ()) -> None:
        """Write the `trial` prompts, in this thread, then start the engine's thread.

        An engine whose every step fails (no compiler, no memory) has then not started, and no unit is suspected for it.
        """
        if trial:
            self._engine.submit(trial)
        while self._engine.unfinished:
            self._step_began = time.monotonic()
            self._engine.step()
        self._step_began = None
        self._thread.start()

    def generate(self, prompts: list[Prompt]) -> tuple[dict[str, Generation], float]:
        """Wait for the generation of every prompt, by prompt id, and the seconds of the engine's time that they took.

        Raises what the engine raised that concerns no single row, and what `stop` was given.
        """
        request = Request(prompts)
        with self._lock:
            if self._error:
                raise self._error
            self._queued.put(request)
        request.done.wait()
        if request.error:
            raise request.error
        return request.generations, request.busy_s

    def stop(self, error: CapsFusionError) -> None:
        """Serve nobody any more: all units under way, and all later ones, raise `error`. Waits for the current step."""
        self._refuse(error)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._queued.put(None)
            self._thread.join(STOP_S)
        self._ended.set()
        # The watchdog's thread holds the engine. Without the join it can free the engine's tensors while the interpreter
        # shuts down, and torch then aborts the process.
        if threading.current_thread() is not self._watchdog:
            self._watchdog.join(STOP_S)

    def _refuse(self, error: CapsFusionError) -> None:
        """Fail every unit under way and every later one with `error`, or with the error of an earlier call."""
        with self._lock:
            error = self._error = self._error or error
            waiting = list(self._owner.values())
            with suppress(queue.Empty):
                while True:
                    waiting += [request for request in (self._queued.get_nowait(),) if request]
        for request in waiting:
            request.fail(error)

    def _run(self) -> None:
        """The engine's thread: submit what has come, step, hand out what has finished."""
        try:
            while self._take_requests():
                self._hand_out(self._step())
        except CapsFusionError as error:
            if isinstance(error, EngineError):
                self._died(error)
            # A refused key, a server that is gone, a cap that is reached, a model that writes nothing: neither a row nor
            # a process is at fault, and another actor would do no better. The units raise it, and the run ends with it.
            self._refuse(error)
        except BaseException as error:
            self._died(error)
            self._refuse(
                EngineError(f"the engine died ({type(error).__name__}: {error}); see the log for its traceback")
            )

    def _died(self, error: BaseException) -> None:
        # The rows are named, so that one that kills engines can be found.
        log.exception("the engine died with %d rows in flight: %s", len(self._owner), sorted(self._owner)[:20])
        self._on_failure("dead")

    def _take_requests(self) -> bool:
        """Submit all queued requests; wait for one while the engine has nothing to do. False where the loop is to end."""
        self._step_began = None
        while not self._error and (not self._engine.unfinished or not self._queued.empty()):
            request = self._queued.get()
            if request is None:
                break
            with self._lock:
                if self._error:
                    request.fail(self._error)
                    break
                self._owner |= dict.fromkeys((prompt.id for prompt in request.prompts), request)
                self._working.append(request)
            self._engine.submit(request.prompts)
        return self._error is None

    def _step(self) -> list[Generation]:
        began = self._step_began = time.monotonic()
        finished = self._engine.step()
        if self._check:
            self._check.judge(finished)
        step_s = time.monotonic() - began
        share_step(step_s, self._working)
        if self._monitor:
            self._monitor.stepped(step_s, self._engine, finished)
        return finished

    def _hand_out(self, finished: Sequence[Generation]) -> None:
        for generation in finished:
            request = self._owner.pop(generation.id)
            request.generations[generation.id] = generation
            if not request.left:
                self._working.remove(request)
                request.done.set()

    def _watch(self) -> None:
        """The watchdog's thread: a step that hangs (a driver, a deadlock) would hold its units for ever."""
        while not self._ended.wait(self._stall_s / 10):
            began = self._step_began
            if began is not None and time.monotonic() - began > self._stall_s:
                log.error(
                    "the engine stalled: one step takes longer than engine.stall_s=%g; the stacks of all threads follow",
                    self._stall_s,
                )
                faulthandler.dump_traceback(sys.stderr)
                self._on_failure("stalled")
                self._refuse(
                    EngineError(f"the engine stalled: one step took longer than engine.stall_s={self._stall_s:g}")
                )
                return
