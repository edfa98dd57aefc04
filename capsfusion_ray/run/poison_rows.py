"""Find the row that kills the worker which fuses it, by halving, and reject that row alone.

A unit notes its attempt in the store before its rows reach an engine, and deletes the note afterwards. A note that is
still there means that the worker died. Units in flight together die together, so the first deaths prove nothing: after
MAX_SHARED_DEATHS of them a unit runs alone in its actor, and each death then halves the rows under suspicion, until a
single row has died alone twice. `following` is pure; AttemptLog knows the store; PoisonRowSearch knows the engine's loop.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from capsfusion_ray.core.types import FinishReason, Generation, Prompt
from capsfusion_ray.dataset.layout import attempt_path
from capsfusion_ray.errors import EngineError
from capsfusion_ray.run.reader_writer_lock import ReaderWriterLock
from capsfusion_ray.storage import Store, patiently, read_note, write_note

log = logging.getLogger(__name__)
MAX_SHARED_DEATHS = 2
MAX_DEATHS = 60  # two poison rows in a unit of 10,000 take 32
Range = tuple[int, int]  # [first, last) of the rows that a unit sends to the engine, in their order
Generated = tuple[dict[str, Generation], float]  # by prompt id, and the seconds of the engine's time


@dataclass(frozen=True)
class Attempt:
    """The `number`-th attempt at a unit under one run. `ranges` cover all rows of the unit but the guilty ones."""

    run: str  # a note of another run says that its driver was killed, not a worker
    number: int
    ranges: tuple[Range, ...]
    trying: Range | None = None  # the range in the engine now; set only while the unit runs alone
    accused: int | None = None  # the row during which, alone, the worker died once
    guilty: tuple[int, ...] = ()  # the rows during which, alone, a worker died twice

    @property
    def alone(self) -> bool:
        return self.number > MAX_SHARED_DEATHS

    def on(self, range_: Range) -> Attempt:
        return dataclasses.replace(self, trying=range_)


def following(before: Attempt | None, run: str, rows: int) -> Attempt:
    """The attempt after `before`, whose worker died; the first attempt where `before` is None or of another run."""
    if before is None or before.run != run:
        return Attempt(run, 1, ((0, rows),) if rows else ())
    after = dataclasses.replace(before, number=before.number + 1, trying=None, accused=None)
    if before.trying is None:
        return after
    first, last = before.trying
    if last - first > 1:
        middle = (first + last) // 2
        return dataclasses.replace(after, ranges=_replaced(before, ((first, middle), (middle, last))))
    if before.accused != first:  # one death may be that of a spot node which was taken away: try the row once more
        return dataclasses.replace(after, accused=first)
    return dataclasses.replace(after, ranges=_replaced(before, ()), guilty=(*before.guilty, first))


def _replaced(attempt: Attempt, by: tuple[Range, ...]) -> tuple[Range, ...]:
    """The ranges of `attempt`, with `by` in place of the one that it was trying."""
    at = attempt.ranges.index(attempt.trying)  # never None here: see the caller
    return (*attempt.ranges[:at], *by, *attempt.ranges[at + 1 :])


class AttemptLog:
    """The notes of one run's units, one object per unit under `_run/attempts/`."""

    def __init__(self, store: Store, run: str) -> None:
        self._store, self._run = store, run

    def begin(self, unit_id: str, rows: int) -> Attempt:
        """Note the attempt that starts now, and return it."""
        noted = patiently(lambda: read_note(self._store, attempt_path(unit_id)))
        attempt = following(_parse(noted) if noted else None, self._run, rows)
        self.note(unit_id, attempt)
        return attempt

    def note(self, unit_id: str, attempt: Attempt) -> None:
        patiently(lambda: write_note(self._store, attempt_path(unit_id), attempt))

    def abandon(self, unit_id: str, attempt: Attempt) -> None:
        """Undo `begin`: the attempt was given up although no worker died, so the next one is the same again."""
        if attempt.number == 1:
            self.end(unit_id)
        else:
            self.note(unit_id, dataclasses.replace(attempt, number=attempt.number - 1, trying=None))

    def end(self, unit_id: str) -> None:
        """Delete the note of a unit that is fused."""
        patiently(lambda: self._store.delete([attempt_path(unit_id)]))


def _parse(fields: dict[str, Any]) -> Attempt:
    fields["ranges"] = tuple((first, last) for first, last in fields["ranges"])
    fields["trying"] = tuple(fields["trying"]) if fields["trying"] else None
    return Attempt(**fields | {"guilty": tuple(fields["guilty"])})


class PoisonRowSearch:
    """Gets the prompts of each unit written, and notes the attempt around it. Used by one actor, from several threads."""

    def __init__(self, attempts: AttemptLog, generate: Callable[[list[Prompt]], Generated]) -> None:
        self._attempts, self._generate = attempts, generate
        self._lock = ReaderWriterLock()  # units share the engine; one that is suspected has it to itself
        self.under_way: dict[str, Attempt] = {}  # by the id of each unit that has a note

    def generate(self, unit_id: str, prompts: list[Prompt]) -> Generated:
        """The generation of every prompt; that of a guilty row has finish=CRASH.

        Raises EngineError for a unit whose worker died MAX_DEATHS times: then no row is at fault, but the machine.
        """
        with self._lock.shared():
            attempt = self.under_way[unit_id] = self._attempts.begin(unit_id, len(prompts))
            if attempt.number > MAX_DEATHS:
                raise EngineError(
                    f"unit {unit_id}: its worker died {MAX_DEATHS} times, whatever rows it was given; read the workers' logs, "
                    "remove the cause, and give the same command again"
                )
            generated: Generated = ({}, 0.0) if attempt.alone else self._generate(prompts)
        if attempt.alone:
            with self._lock.exclusive():
                generated = self._generate_alone(unit_id, prompts, attempt)
        self._attempts.end(unit_id)
        del self.under_way[unit_id]
        return generated

    def _generate_alone(self, unit_id: str, prompts: list[Prompt], attempt: Attempt) -> Generated:
        """One range after the other, each noted before it is tried."""
        log.warning("unit %s runs alone: attempt %d, %d ranges of rows", unit_id, attempt.number, len(attempt.ranges))
        written: dict[str, Generation] = {}
        busy_s = 0.0
        for first, last in attempt.ranges:
            self._attempts.note(unit_id, attempt.on((first, last)))
            more, seconds = self._generate(prompts[first:last])
            written, busy_s = written | more, busy_s + seconds
        for row in attempt.guilty:
            error = "the process that fused this row alone died, twice"
            written[prompts[row].id] = Generation(prompts[row].id, "", FinishReason.CRASH, error=error)
        return written, busy_s

    def close(self, timeout_s: float) -> bool:
        """Begin no further unit, and wait for those under way. True once all of them are fused, False after `timeout_s`."""
        return self._lock.close(timeout_s)

    def abandon(self) -> int:
        """Give up the units under way, so that nothing is suspected for it; how many they are."""
        given_up = list(self.under_way.items())
        for unit_id, attempt in given_up:
            self._attempts.abandon(unit_id, attempt)
        return len(given_up)
