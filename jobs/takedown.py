"""Take rows out of a finished output: python jobs/takedown.py output.path=… urls=<file> | row_ids=<file> | above={punsafe: 0.3}"""

import sys
from typing import Any

from capsfusion_ray.cli import run_job, with_page
from capsfusion_ray.dataset.takedown import TakedownConfig, takedown


def takedown_and_report(cfg: TakedownConfig) -> dict[str, Any]:
    return with_page(takedown(cfg), cfg.output)


if __name__ == "__main__":
    sys.exit(run_job(TakedownConfig, takedown_and_report))
