"""Fuse caption shards into a partitioned dataset: python jobs/fuse.py [conf/….yaml …] input.path=… output.path=…"""

import logging
import sys
from typing import Any

from capsfusion_ray.cli import run_job
from capsfusion_ray.config import FuseConfig
from capsfusion_ray.report.job import ReportConfig, report
from capsfusion_ray.run.driver import fuse


def fuse_and_report(cfg: FuseConfig) -> dict[str, Any]:
    """The dataset, then the page on it. The page is no part of the promise: a run whose page fails is done all the same."""
    totals = fuse(cfg)
    try:
        page = report(ReportConfig(cfg.output, price_per_gpu_hour=cfg.cluster.price_per_gpu_hour))
    except Exception:
        logging.getLogger(__name__).exception(
            "the dataset is done, its report is not: python jobs/report.py output.path=%s", cfg.output.path
        )
        return totals
    return totals | {"report": page["report"]}


if __name__ == "__main__":
    sys.exit(run_job(FuseConfig, fuse_and_report))
