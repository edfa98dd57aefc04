"""Progress: a bar that is shown from the first moment and fits the terminal, plain lines in a log, rows counted from commits."""

import io
import json
import logging
import re
import sys

import pytest

from capsfusion_ray.cli import _Stderr
from capsfusion_ray.core.accounting import UnitSummary
from capsfusion_ray.dataset.layout import PROGRESS
from capsfusion_ray.run.progress import Progress
from capsfusion_ray.storage import Store

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def unit(number, rejected=1):
    return UnitSummary(
        f"u{number}",
        "a",
        1000 * number,
        1000 * (number + 1),
        fused=1000 - rejected,
        rejected=rejected,
        reasons={"too_short": rejected},
    )


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


@pytest.mark.parametrize("columns", [60, 100, 160])
def test_the_bar_is_shown_before_the_first_commit_and_fits_the_terminal(tmp_path, terminal, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    progress = Progress(Store(str(tmp_path)), 4000, 4, 2, terminal)
    with progress:
        first = ESCAPE.sub("", terminal.getvalue())
        progress.committed(unit(0))
    assert "0/4,000 rows (0.0%)" in first
    assert "━" in first
    drawn = [line for line in re.split(r"[\r\n]", first) if "\u2501" in line or "rows" in line]
    assert max(map(len, drawn)) <= columns
    assert ESCAPE.sub("", terminal.getvalue()).splitlines()[-1].startswith("1,000/4,000 rows (25.0%)"), (
        "the last line stays on the screen"
    )


def test_a_log_line_goes_above_the_bar_and_not_into_it(tmp_path, terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    said = logging.LogRecord("a", logging.WARNING, "", 0, "a shard is damaged", None, None)
    with Progress(Store(str(tmp_path)), 4000, 4, 2, terminal):
        _Stderr().handle(said)
    lines = [line.strip() for line in re.split(r"[\r\n]", ESCAPE.sub("", terminal.getvalue()))]
    assert "a shard is damaged" in lines


def test_a_resumed_run_counts_all_rows_and_shows_its_own_speed(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("capsfusion_ray.run.progress.time.monotonic", lambda: clock[0])
    log = io.StringIO()
    store = Store(str(tmp_path))
    progress = Progress(store, 4000, 4, 2, log, began=0.0)
    with progress:
        progress.resumed(unit(0))
        progress.resumed(unit(1))
        assert progress.captions_per_s == 0
        assert progress.eta_s is None
        clock[0] = 10.0
        progress.committed(unit(2))
        progress.save()
    assert log.getvalue().startswith("3,000/4,000 rows (75.0%)"), "a log gets lines"
    assert "3 rejected  units 3/4  2 actors" in log.getvalue()
    assert "\x1b" not in log.getvalue()
    told = json.loads(store.get(PROGRESS))
    assert (told["rows"], told["planned"], told["rejected"], told["units_done"]) == (3000, 4000, 3, 3)
    assert told["captions_per_s"] == 100, "the two resumed units cost this process nothing"
    assert told["eta_s"] == 10
