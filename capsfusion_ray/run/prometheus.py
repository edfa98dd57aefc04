"""Report metrics to Prometheus, through the metrics agent of each Ray node. The accounting uses none of them.

Ray serves the names below with the prefix `ray_`. The dashboard and the alert rules in deploy/monitoring use these names
and no others; a test checks that.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from functools import cache
from typing import Any

from ray.util import metrics

from capsfusion_ray.core.accounting import OUTCOMES, UnitSummary
from capsfusion_ray.core.types import Generation
from capsfusion_ray.engines.base import Engine
from capsfusion_ray.storage import client_faults

COUNTERS = {
    "capsfusion_rows": ("Rows committed, by outcome", ("outcome",)),
    "capsfusion_reasons": ("Rows rejected or filtered, by reason", ("reason",)),
    "capsfusion_flags": ("Rows of data/ that carry a flag", ("flag",)),
    "capsfusion_units": ("Units committed", ()),
    "capsfusion_tokens": ("Tokens of finished captions, by kind: prompt or generated", ("kind",)),
    "capsfusion_captions": ("Captions that left the engine", ()),
    "capsfusion_store_faults": (
        "Requests to the store that failed and were repeated or given up, by cause",
        ("cause",),
    ),
}
GAUGES = {
    "capsfusion_planned_rows": "Rows of the plan",
    "capsfusion_committed_rows": "Rows committed, those of earlier processes included",
    "capsfusion_committed_at": "Unix time of the latest commit",
    "capsfusion_actors": "Actors that the pool may hold",
    "capsfusion_busy_slots": "Captions an engine decodes together now",
    "capsfusion_slots": "Captions an engine can decode together",
    "capsfusion_kv_share": "Share of an engine's KV cache that holds tokens",
    "capsfusion_gpu_memory_bytes": "Memory that torch holds on the actor's GPU",
}
HISTOGRAMS = {  # seconds
    "capsfusion_step_seconds": ("One step of an engine", (0.01, 0.03, 0.1, 0.2, 0.4, 1.0, 3.0, 10.0, 60.0)),
    "capsfusion_unit_seconds": (
        "A unit in its actor, first prompt to last caption",
        (1, 10, 30, 60, 120, 300, 600, 1800),
    ),
}
GAUGES_EVERY_S = 2.0  # well below Ray's report interval of 10 s


class EngineMonitor:
    """Reports on the engine of one actor. Made in the driver; its metrics are made in the actor's process."""

    def __init__(self) -> None:
        self._shown = 0.0

    def stepped(self, seconds: float, engine: Engine, finished: list[Generation]) -> None:
        _histogram("capsfusion_step_seconds").observe(seconds)
        if finished:
            _counter("capsfusion_captions").inc(len(finished))
            _add("capsfusion_tokens", sum(generation.prompt_tokens for generation in finished), kind="prompt")
            _add("capsfusion_tokens", sum(generation.output_tokens for generation in finished), kind="generated")
        now = time.monotonic()
        if now - self._shown >= GAUGES_EVERY_S:
            self._shown, occupancy = now, engine.occupancy
            _gauge("capsfusion_busy_slots").set(occupancy.busy)
            _gauge("capsfusion_slots").set(occupancy.capacity)
            _gauge("capsfusion_kv_share").set(occupancy.kv_share)
            _gauge("capsfusion_gpu_memory_bytes").set(_gpu_bytes())


class RunMonitor:
    """Reports on the commits of the driver, while used as a context.

    It sets its gauges again and again: Ray serves a gauge for two reports only after its process set it, so the size of
    the plan, or the last commit of a stalled run, would be gone when Prometheus asks for it.
    """

    def __init__(self, planned_rows: int, committed_rows: int, actors: int) -> None:
        self._now: dict[str, float] = {"capsfusion_planned_rows": planned_rows, "capsfusion_actors": actors}
        self._commit(committed_rows)
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="monitor", daemon=True)

    def __enter__(self) -> RunMonitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._set_gauges()  # with the last commit
        self._leave.set()
        self._thread.join()

    def committed(self, unit: UnitSummary, committed_rows: int) -> None:
        for outcome in OUTCOMES:
            _add("capsfusion_rows", unit.rows(outcome), outcome=outcome)
        for reason, rows in (Counter(unit.reasons) + Counter(unit.filtered)).items():
            _add("capsfusion_reasons", rows, reason=reason)
        for flag, rows in unit.flags.items():
            _add("capsfusion_flags", rows, flag=flag)
        _counter("capsfusion_units").inc(1)
        _histogram("capsfusion_unit_seconds").observe(unit.engine_s)
        self._commit(committed_rows)

    def _commit(self, committed_rows: int) -> None:
        self._now |= {"capsfusion_committed_rows": committed_rows, "capsfusion_committed_at": time.time()}

    def _set_gauges(self) -> None:
        for name, value in list(self._now.items()):
            _gauge(name).set(value)

    def _repeat(self) -> None:
        self._set_gauges()
        while not self._leave.wait(GAUGES_EVERY_S):
            self._set_gauges()


def count_store_faults() -> None:
    """Count the faults that the store clients of this process have met since the last call."""
    for cause, requests in client_faults().items():
        _add("capsfusion_store_faults", requests, cause=cause)


@cache
def _counter(name: str) -> metrics.Counter:
    description, tags = COUNTERS[name]
    return metrics.Counter(name, description=description, tag_keys=tags)


@cache
def _gauge(name: str) -> metrics.Gauge:
    return metrics.Gauge(name, description=GAUGES[name])


@cache
def _histogram(name: str) -> metrics.Histogram:
    description, bounds = HISTOGRAMS[name]
    return metrics.Histogram(name, description=description, boundaries=list(bounds))


def _add(name: str, value: int, **tags: str) -> None:
    if value:  # Ray's counters refuse 0
        _counter(name).inc(value, tags)


def _gpu_bytes() -> int:
    torch: Any = sys.modules.get("torch")  # an engine without a model never imports it
    return int(torch.cuda.memory_reserved()) if torch is not None and torch.cuda.is_available() else 0
