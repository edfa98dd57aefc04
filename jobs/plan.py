"""What a fuse run would do, take and cost; writes nothing: python jobs/plan.py [conf/….yaml …] input.path=… output.path=…"""

import sys

from capsfusion_ray.cli import run_job
from capsfusion_ray.config import PlanConfig
from capsfusion_ray.run.quote import estimate

if __name__ == "__main__":
    sys.exit(run_job(PlanConfig, estimate))
