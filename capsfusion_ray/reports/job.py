"""The job `capsfusion report`: write one self-contained HTML page about an output, finished or running.

The page shows counts, speed, caption lengths, diversity, and captions to read. With `evaluation` it also shows what
`capsfusion evaluate` measured against reference captions. With `beside.path` the page compares two outputs of the same
rows: the figures of both, and both captions of a row with their differences.

The job reads the summaries of the units and a limited sample of rows, however large the dataset is. `sample` draws the
rows, `figures` computes the figures, and `page` writes the HTML.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capsfusion_ray.config import OutputConfig, section, setting
from capsfusion_ray.dataset.layout import COMPARISON, REPORT
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.reports.figures import figures
from capsfusion_ray.reports.page import render
from capsfusion_ray.reports.sample import Sample, State, draw, state_of
from capsfusion_ray.storage import Store
from capsfusion_ray.training.figures_file import read_figures


@dataclass(frozen=True)
class ReportConfig:
    """capsfusion report"""

    output: OutputConfig = section(OutputConfig, required=["path"])
    evaluation: str = setting(
        "", "the output.path of a `capsfusion evaluate`, whose figures become a section of the page", common=True
    )
    beside: OutputConfig = section(OutputConfig, "another output of the same rows, to compare with")
    rows_per_reason: int = setting(25, "captions to show per reason and flag; ten times as many of rows without any")
    price_per_gpu_hour: float | None = setting(
        None, "USD; null: the price that the run was given, else 2.5", common=True
    )

    def __post_init__(self) -> None:
        if self.rows_per_reason < 1:
            raise ConfigError(f"rows_per_reason={self.rows_per_reason}: must be at least 1")


def report(cfg: ReportConfig) -> dict[str, Any]:
    """Write `<output>/report.html`, or `<output>/comparison.html` if `beside.path` is set.

    Returns {report: URL of the page, finished, rows: counts by outcome, sampled: rows on the page, bytes, seconds}.
    Raises ConfigError for a folder that is no output, for two outputs without a common row, and for an `evaluation`
    without figures.
    """
    began = time.monotonic()
    evaluation = read_figures(Path(cfg.evaluation)) if cfg.evaluation else None
    store, state = _opened(cfg.output, "output.path")
    name, beside = (COMPARISON, _opened(cfg.beside, "beside.path")) if cfg.beside.path else (REPORT, None)
    sample = draw(store, state, cfg.rows_per_reason, beside)
    shown = figures(state, sample.measured, cfg.price_per_gpu_hour)
    if evaluation:
        shown["evaluation"] = evaluation
    if beside:
        shown["beside"] = _compared(cfg, sample, beside[1])
    page = render(cfg.output.path, shown, sample.shown).encode()
    store.put(name, page)
    return {
        "report": store.url(name),
        "finished": state.finished,
        "rows": shown["counts"],
        "sampled": len(sample.shown),
        "bytes": len(page),
        "seconds": round(time.monotonic() - began, 2),
    }


def _compared(cfg: ReportConfig, sample: Sample, other: State) -> dict[str, Any]:
    """The figures of the other output, and how many of the sampled captions differ."""
    if not sample.shown:
        raise ConfigError(
            f"beside.path={cfg.beside.path}: this output has none of the rows that were drawn from {cfg.output.path}; "
            "give two outputs of the same input"
        )
    rows = [row.other for row in sample.measured if row.other]
    counts = {"compared": sample.compared, "different": sample.different}
    return {"path": cfg.beside.path, **counts, **figures(other, rows, cfg.price_per_gpu_hour)}


def _opened(output: OutputConfig, key: str) -> tuple[Store, State]:
    store = Store(output.path, output.storage)
    state = state_of(store)
    if state is None:
        raise ConfigError(
            f"{key}={output.path}: the folder holds no plan; give an output of capsfusion fuse, finished or running"
        )
    return store, state
