"""Take rows out of a finished output: python jobs/takedown.py output.path=… urls=<file> | row_ids=<file> | above={punsafe: 0.3}"""

import sys

from capsfusion_ray.cli import run_job
from capsfusion_ray.dataset.takedown import TakedownConfig, takedown

if __name__ == "__main__":
    sys.exit(run_job(TakedownConfig, takedown))
