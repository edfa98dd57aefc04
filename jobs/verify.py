"""Exit 0 only if every planned row of a finished output is accounted for: python jobs/verify.py output.path=… [deep=true]"""

import sys

from capsfusion_ray.cli import run_job
from capsfusion_ray.config import VerifyConfig
from capsfusion_ray.dataset.verify import verify

if __name__ == "__main__":
    sys.exit(run_job(VerifyConfig, verify))
