"""Fuse caption shards into a partitioned dataset: python jobs/fuse.py [conf/….yaml …] input.path=… output.path=…"""

import sys
from typing import Any

from capsfusion_ray.cli import run_job, with_page
from capsfusion_ray.config import FuseConfig
from capsfusion_ray.run.driver import fuse


def fuse_and_report(cfg: FuseConfig) -> dict[str, Any]:
    return with_page(fuse(cfg), cfg.output, cfg.cluster.price_per_gpu_hour)


if __name__ == "__main__":
    sys.exit(run_job(FuseConfig, fuse_and_report))
