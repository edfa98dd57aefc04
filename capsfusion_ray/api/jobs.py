"""The jobs that are more than one call below: a typed config in, a dict for the command's last line out.

Each function imports what it needs, so that a job without Ray does not load it.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from capsfusion_ray.config import FuseConfig, OutputConfig, PlanConfig

if TYPE_CHECKING:
    from capsfusion_ray.dataset.takedown_criteria import TakedownConfig
    from capsfusion_ray.reports.terminal import ShowConfig
    from capsfusion_ray.training.label import LabelConfig

log = logging.getLogger(__name__)


def fuse(cfg: FuseConfig) -> dict[str, Any]:
    """Fuse what is pending, and write the page on the output."""
    from capsfusion_ray.run import driver

    return with_page(driver.fuse(cfg), cfg.output, cfg.cluster.price_per_gpu_hour)


def plan(cfg: PlanConfig) -> dict[str, Any]:
    """The estimate of a fuse run, also printed on stderr for people."""
    from capsfusion_ray.run.quote import estimate

    quote = estimate(cfg)
    print(quote.pop("text"), file=sys.stderr)
    return quote


def label(cfg: LabelConfig) -> dict[str, Any]:
    """Fuse with a teacher; `train` in the result is the command that trains on the labels."""
    from capsfusion_ray.run import driver
    from capsfusion_ray.training.label import prepare, train_command

    return driver.fuse(prepare(cfg)) | {"train": train_command(cfg)}


def takedown(cfg: TakedownConfig) -> dict[str, Any]:
    """Remove rows, and write the page on the output anew: the old one may show them."""
    from capsfusion_ray.dataset import takedown as removal

    return with_page(removal.takedown(cfg), cfg.output)


def show(cfg: ShowConfig) -> None:
    """Print captions on stdout."""
    from capsfusion_ray.reports import terminal

    terminal.show(cfg.output.path, cfg.count, sys.stdout, cfg.output.storage)


def with_page(result: dict[str, Any], output: OutputConfig, price_per_gpu_hour: float | None = None) -> dict[str, Any]:
    """Write the page on the output of a job that is done, and add its place to the result as `report`.

    A page that cannot be written does not make the job fail: the error is logged, and the result has no `report`.
    """
    from capsfusion_ray.reports.job import ReportConfig, report

    try:
        page = report(ReportConfig(output, price_per_gpu_hour=price_per_gpu_hour))
    except Exception:
        log.exception(
            "the job is done, its report is not; write it with: capsfusion report output.path=%s", output.path
        )
        return result
    return result | {"report": page["report"]}
