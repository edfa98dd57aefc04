"""What a unit was trying when its worker died, and the narrowing of such deaths down to the guilty row.

A unit notes its attempt in the store before it reaches an engine, and takes the note away afterwards. A note that is
still there means that the worker died. Units in flight together share a death, so the first deaths prove nothing: after
SHARED_DEATHS a unit runs alone in its actor, and from then on a death halves the rows under suspicion until a single
row has died alone twice. Knows the store only; the narrowing is pure.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from capsfusion_ray.dataset.layout import attempt_path
from capsfusion_ray.storage import Store, patiently, read_note, write_note

SHARED_DEATHS = 2
Range = tuple[int, int]  # of the rows that a unit sends to the engine, in their order: [first, last)


@dataclass(frozen=True)
class Attempt:
    """The `number`-th attempt at a unit under one run. Ranges tile the unit's rows but for the guilty ones."""

    run: str  # a killed driver's attempts are no deaths of a worker
    number: int
    ranges: tuple[Range, ...]
    trying: Range | None = None  # set only while the unit is alone
    accused: int | None = None  # the row that died alone once
    guilty: tuple[int, ...] = ()

    @property
    def alone(self) -> bool:
        return self.number > SHARED_DEATHS

    def on(self, range_: Range) -> Attempt:
        return dataclasses.replace(self, trying=range_)


def following(before: Attempt | None, run: str, rows: int) -> Attempt:
    """The attempt after `before`, whose worker died; the first one where there is none of this run."""
    if before is None or before.run != run:
        return Attempt(run, 1, ((0, rows),) if rows else ())
    after = dataclasses.replace(before, number=before.number + 1, trying=None, accused=None)
    if before.trying is None:
        return after
    first, last = before.trying
    if last - first > 1:
        middle = (first + last) // 2
        return dataclasses.replace(after, ranges=_replaced(before, ((first, middle), (middle, last))))
    if before.accused != first:  # a spot node that was taken away is no proof: once more
        return dataclasses.replace(after, accused=first)
    return dataclasses.replace(after, ranges=_replaced(before, ()), guilty=(*before.guilty, first))


def _replaced(attempt: Attempt, by: tuple[Range, ...]) -> tuple[Range, ...]:
    """The ranges, with the one on trial replaced."""
    at = attempt.ranges.index(attempt.trying)  # only called with one on trial
    return (*attempt.ranges[:at], *by, *attempt.ranges[at + 1 :])


class AttemptLog:
    """The notes of one run's units, one object each under `_run/attempts/`."""

    def __init__(self, store: Store, run: str) -> None:
        self._store, self._run = store, run

    def begin(self, unit_id: str, rows: int) -> Attempt:
        """Note, and return, the attempt that starts now."""
        noted = patiently(lambda: read_note(self._store, attempt_path(unit_id)))
        attempt = following(_parse(noted) if noted else None, self._run, rows)
        self.note(unit_id, attempt)
        return attempt

    def note(self, unit_id: str, attempt: Attempt) -> None:
        patiently(lambda: write_note(self._store, attempt_path(unit_id), attempt))

    def abandon(self, unit_id: str, attempt: Attempt) -> None:
        """The attempt was broken off, and nobody died: the next one stands where it stood."""
        if attempt.number == 1:
            self.end(unit_id)
        else:
            self.note(unit_id, dataclasses.replace(attempt, number=attempt.number - 1, trying=None))

    def end(self, unit_id: str) -> None:
        """The unit came through."""
        patiently(lambda: self._store.delete([attempt_path(unit_id)]))


def _parse(fields: dict[str, Any]) -> Attempt:
    fields["ranges"] = tuple((first, last) for first, last in fields["ranges"])
    fields["trying"] = tuple(fields["trying"]) if fields["trying"] else None
    return Attempt(**fields | {"guilty": tuple(fields["guilty"])})
