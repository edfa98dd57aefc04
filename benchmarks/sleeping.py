"""An engine that sleeps, as a host process does while its GPU computes. In a step each busy slot gets one token. No torch.

A caption is that of the echo engine, and takes one step per word. Slots are refilled while others are busy, as in the beam
engine, so the order of units, their last captions and a killed process cost as much time as with a real engine. Steps happen
at fixed times while there is work, as on a GPU. If a busy machine wakes the host too late, only the refill is late. The start
takes LOAD_S, like loading a model. `plug_in` is a `worker_process_setup_hook`: Ray calls it in each worker of a job that is
submitted with this runtime_env, so the job needs no change (engine.kind=echo).
"""

from __future__ import annotations

import os
import time
from collections import deque
from pathlib import Path

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.core.types import Generation, Prompt
from capsfusion_ray.engines.base import ENGINES, Occupancy
from capsfusion_ray.engines.echo import EchoEngine

STEP_S = 0.25  # a real step takes a tenth of it; so many processes on few cores must not be kept busy by waking up
LOAD_S = 10.0
JOURNAL = "SLEEPING_JOURNAL"  # variable: a folder for one file an engine, named by its pid
JOURNAL_S = 1.0


def plug_in() -> None:
    """Have build_engine make this one for engine.kind=echo, in this process."""
    ENGINES["echo"] = "sleeping:SleepingEngine"


class SleepingEngine(EchoEngine):
    """Implements engines.base.Engine. Writes slots / (mean words * STEP_S) captions/s while it is full."""

    def __init__(self, engine: EngineConfig, decode: DecodeConfig) -> None:
        super().__init__(engine, decode)
        self._waiting: deque[Prompt] = deque()
        self._ends: dict[int, list[Generation]] = {}  # by the step that writes their last word
        self._room, self._busy, self._steps = engine.slots or 64, 0, 0
        self._words, self._submitted_at, self._noted_at = 0, 0.0, 0.0
        folder = os.environ.get(JOURNAL)
        self._journal = Path(folder, str(os.getpid())) if folder else None
        time.sleep(LOAD_S)
        self._stepped_at = time.monotonic()
        self._note()

    def submit(self, prompts: list[Prompt]) -> None:  # type: ignore[override]
        now = time.monotonic()
        if not self.unfinished:
            self._stepped_at = now
        self._waiting.extend(prompts)
        self._submitted_at = now

    @property
    def unfinished(self) -> int:
        return len(self._waiting) + self._busy

    @property
    def occupancy(self) -> Occupancy:
        return Occupancy(self._busy, self._room)

    def step(self) -> list[Generation]:
        while self._waiting and self._busy < self._room:
            generation = self._write(self._waiting.popleft())
            self._ends.setdefault(self._steps + max(generation.output_tokens, 1), []).append(generation)
            self._busy += 1
        time.sleep(max(self._stepped_at + STEP_S - time.monotonic(), 0.0))
        finished: list[Generation] = []
        while self._stepped_at + STEP_S <= time.monotonic():
            self._stepped_at += STEP_S
            self._steps += 1
            self._words += self._busy
            finished += (ended := self._ends.pop(self._steps, []))
            self._busy -= len(ended)
        if not self.unfinished or time.monotonic() - self._noted_at >= JOURNAL_S:
            self._note()
        return finished

    def _note(self) -> None:
        """When, the words written until then, and when prompts came last; seconds of the machine's monotonic clock."""
        self._noted_at = time.monotonic()
        if self._journal:
            with self._journal.open("a") as journal:
                print(self._noted_at, self._words, self._submitted_at, file=journal)
