"""One self-contained page on an output, finished or running: counts, speed, lengths, diversity, and captions to read.

With `evaluation` also what jobs/evaluate.py measured against reference captions. With `beside.path` a page on two
outputs of the same rows: figures beside each other, captions with their differences.

Reads summaries and a bounded sample, however large the dataset is. `sample` draws the rows, `figures` computes, `page`
writes the HTML.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capsfusion_ray.config import OutputConfig
from capsfusion_ray.dataset.layout import COMPARISON, REPORT
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.reports.figures import figures
from capsfusion_ray.reports.page import render
from capsfusion_ray.reports.sample import State, draw, state_of
from capsfusion_ray.storage import Store
from capsfusion_ray.training.metrics import FIGURES


@dataclass(frozen=True)
class ReportConfig:
    """jobs/report.py"""

    output: OutputConfig = field(default_factory=OutputConfig)
    evaluation: str = ""  # the output.path of a jobs/evaluate.py: its figures become a section of the page
    beside: OutputConfig = field(default_factory=OutputConfig)  # another output of the same rows, to compare with
    rows_per_reason: int = 25  # captions to read, of each gate and of the ordinary ones tenfold
    price_per_gpu_hour: float | None = None  # USD; null: as the run was told, else 2.5

    def __post_init__(self) -> None:
        if self.rows_per_reason < 1:
            raise ConfigError(f"rows_per_reason={self.rows_per_reason}: must be at least 1")


def report(cfg: ReportConfig) -> dict[str, Any]:
    """Write `<output>/report.html`, or comparison.html where there is a `beside.path`; the figures that it shows.

    Raises ConfigError where there is no output of ours, the two have no row in common, or `evaluation` holds no figures.
    """
    if not cfg.output.path:
        raise ConfigError("output.path: missing; give output.path=<an output of jobs/fuse.py>")
    began = time.monotonic()
    evaluation = _evaluation(Path(cfg.evaluation)) if cfg.evaluation else None
    store, state = _opened(cfg.output, "output.path")
    name, beside = (COMPARISON, _opened(cfg.beside, "beside.path")) if cfg.beside.path else (REPORT, None)
    sample = draw(store, state, cfg.rows_per_reason, beside)
    if beside and not sample.shown:
        raise ConfigError(
            f"beside.path={cfg.beside.path}: has none of the rows that were drawn from {cfg.output.path}; give two outputs of one input"
        )
    shown = figures(state, sample.measured, cfg.price_per_gpu_hour)
    if evaluation:
        shown["evaluation"] = evaluation
    if beside:
        both = [row.other for row in sample.measured if row.other]
        counted = {"compared": sample.compared, "different": sample.different}
        shown["beside"] = {"path": cfg.beside.path, **counted, **figures(beside[1], both, cfg.price_per_gpu_hour)}
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


def _evaluation(folder: Path) -> dict[str, Any]:
    try:
        written: dict[str, Any] = json.loads((folder / FIGURES).read_text("utf-8"))
        return {key: written[key] for key in ("rows", "measured", "system", "figures")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"evaluation={folder}: no {FIGURES} of jobs/evaluate.py in it ({error!r}); give what that job had as output.path"
        ) from error


def _opened(output: OutputConfig, key: str) -> tuple[Store, State]:
    store = Store(output.path, output.storage)
    state = state_of(store)
    if state is None:
        raise ConfigError(f"{key}={output.path}: no plan in it, so this is no output of jobs/fuse.py")
    return store, state
