"""What a fuse run would do, take and cost; writes nothing: python jobs/plan.py [conf/….yaml …] input.path=… output.path=…"""

import sys

from capsfusion_ray.config import FuseConfig
from capsfusion_ray.doorway import run_job
from capsfusion_ray.run import estimate

if __name__ == "__main__":
    sys.exit(run_job(FuseConfig, estimate))
