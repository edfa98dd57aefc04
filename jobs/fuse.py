"""Fuse caption shards into a partitioned dataset: python jobs/fuse.py [conf/….yaml …] input.path=… output.path=…"""

import sys

from capsfusion_ray.config import FuseConfig
from capsfusion_ray.doorway import run_job
from capsfusion_ray.run import fuse

if __name__ == "__main__":
    sys.exit(run_job(FuseConfig, fuse))
