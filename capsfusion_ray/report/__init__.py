"""One self-contained page on an output, finished or running: counts, speed, lengths, diversity, and captions to read.

Reads summaries and a bounded sample, however large the dataset is. `sample` draws the rows, `figures` computes, `page`
writes the HTML.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from capsfusion_ray.config import OutputConfig
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.report.figures import figures
from capsfusion_ray.report.page import render
from capsfusion_ray.report.sample import draw, state_of
from capsfusion_ray.storage import Store

REPORT = "report.html"


@dataclass(frozen=True)
class ReportConfig:
    """jobs/report.py"""

    output: OutputConfig = field(default_factory=OutputConfig)
    rows_per_reason: int = 25  # captions to read, of each gate and of the ordinary ones tenfold
    price_per_gpu_hour: float = 2.5  # USD

    def __post_init__(self) -> None:
        if self.rows_per_reason < 1:
            raise ConfigError(f"rows_per_reason={self.rows_per_reason}: must be at least 1")


def report(cfg: ReportConfig) -> dict[str, Any]:
    """Write `<output>/report.html`; the figures that it shows. Raises ConfigError where there is no output of ours."""
    if not cfg.output.path:
        raise ConfigError("output.path: missing; give output.path=<an output of jobs/fuse.py>")
    began = time.monotonic()
    store = Store(cfg.output.path, cfg.output.storage)
    state = state_of(store)
    if state is None:
        raise ConfigError(f"output.path={cfg.output.path}: no plan in it, so this is no output of jobs/fuse.py")
    sample = draw(store, state, cfg.rows_per_reason)
    shown = figures(state, sample.measured, cfg.price_per_gpu_hour)
    page = render(cfg.output.path, shown, sample.shown).encode()
    store.put(REPORT, page)
    return {
        "report": store.url(REPORT),
        "finished": state.finished,
        "rows": shown["counts"],
        "sampled": len(sample.shown),
        "bytes": len(page),
        "seconds": round(time.monotonic() - began, 2),
    }
