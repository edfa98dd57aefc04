"""Show how far a run is, counted from its commits: a live bar in a terminal, plain lines in a log, progress.json for others."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from capsfusion_ray.core.accounting import UnitSummary
from capsfusion_ray.dataset.layout import PROGRESS
from capsfusion_ray.errors import StorageError
from capsfusion_ray.storage import Store, StoreRefused, read_note, write_note

log = logging.getLogger(__name__)
LOG_EVERY_S = 10.0
STORE_EVERY_S = 10.0
BAR_WIDTH = 28
HISTORY_POINTS = 240  # at most in progress.json; when there are more, every second one is dropped
_WINDOW_S = 300.0  # the speed that is shown is the mean of this time


@dataclass
class Progress:
    """Counts committed rows; used as a context.

    `planned`: rows of the whole output. `resumed` counts what earlier processes did, so that a resumed run shows its true
    share, and a speed that is its own.
    """

    store: Store
    planned: int
    units: int
    actors: int
    stream: TextIO
    rows: int = 0
    units_done: int = 0
    rejected: int = 0
    resumed_rows: int = 0
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque([(self.began, 0)])
        self._logged = self._stored = self.began
        self._live: Live | None = None
        self._history: list[tuple[float, int, float]] = []  # seconds of work on this run, rows, captions/s
        self._before_s = 0.0  # the seconds that earlier processes worked on this run

    def __enter__(self) -> Progress:
        if noted := read_note(self.store, PROGRESS):
            self._history = [tuple(point) for point in noted.get("history", [])]
            self._before_s = self._history[-1][0] if self._history else 0.0
        if self.stream.isatty():
            # It is shown before the first commit, and refreshed in the minutes between two commits.
            console = Console(file=self.stream)
            self._live = Live(
                console=console, transient=True, refresh_per_second=2, get_renderable=lambda: self._bar(console.width)
            )
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        self._write(self.line)

    def resumed(self, summary: UnitSummary) -> None:
        """Count a unit that an earlier process committed. It does not count towards the speed."""
        self._count(summary)
        self.resumed_rows = self.rows

    def committed(self, summary: UnitSummary) -> None:
        """Count a unit that this process committed; write a line or progress.json where that is due."""
        self._count(summary)
        now = time.monotonic()
        self._recent.append((now, self.rows - self.resumed_rows))
        while len(self._recent) > 2 and now - self._recent[0][0] > _WINDOW_S:
            self._recent.popleft()
        if now - self._logged >= LOG_EVERY_S and not self._live:
            self._logged = now
            self._write(self.line)
        if now - self._stored >= STORE_EVERY_S:
            self._stored = now
            self.save()

    def _count(self, summary: UnitSummary) -> None:
        self.rows += summary.planned - summary.not_retried
        self.rejected += summary.rejected
        self.units_done += 1

    @property
    def captions_per_s(self) -> float:
        (t0, rows0), (t1, rows1) = self._recent[0], self._recent[-1]
        return (rows1 - rows0) / (t1 - t0) if t1 > t0 else 0.0

    @property
    def eta_s(self) -> float | None:
        return (self.planned - self.rows) / self.captions_per_s if self.captions_per_s else None

    @property
    def line(self) -> str:
        share = 100 * self.rows / self.planned if self.planned else 100.0
        eta = "?" if self.eta_s is None else _clock(self.eta_s)
        return (
            f"{self.rows:,}/{self.planned:,} rows ({share:.1f}%)  {self.captions_per_s:,.1f} captions/s  "
            f"{self.rejected:,} rejected  units {self.units_done:,}/{self.units:,}  {self.actors} actors  ETA {eta}"
        )

    def save(self) -> None:
        """Write progress.json. A store that refuses it is a warning: what others read of a run must not end the run."""
        spent = self._before_s + time.monotonic() - self.began
        self._history.append((round(spent, 1), self.rows, round(self.captions_per_s, 2)))
        if len(self._history) > HISTORY_POINTS:
            self._history = self._history[::-2][::-1]  # keeps the last one
        state = {
            "rows": self.rows,
            "planned": self.planned,
            "rejected": self.rejected,
            "units": self.units,
            "units_done": self.units_done,
            "actors": self.actors,
            "captions_per_s": round(self.captions_per_s, 3),
            "eta_s": None if self.eta_s is None else round(self.eta_s, 1),
            "history": self._history,
            "updated_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        try:
            write_note(self.store, PROGRESS, state)
        except (StorageError, StoreRefused) as error:
            log.warning("progress not written: %s", error)

    def _bar(self, width: int) -> Table:
        """The bar left of the line, or above it where the terminal is too narrow for both."""
        line = self.line
        beside = width - len(line) - 2 >= BAR_WIDTH
        bar = ProgressBar(
            total=max(self.planned, 1),
            completed=self.rows,
            width=BAR_WIDTH if beside else min(width - 1, 2 * BAR_WIDTH),
        )
        grid = Table.grid(padding=(0, 1))
        for row in [(bar, line)] if beside else [(bar,), (line,)]:
            grid.add_row(*row)
        return grid

    def _write(self, line: str) -> None:
        print(line, file=self.stream, flush=True)


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds + 0.5), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
