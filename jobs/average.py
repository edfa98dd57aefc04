"""Average models trained from one start: python jobs/average.py models=[a,b] shares=[0.7,0.3] output.path=…"""

import sys

from capsfusion_ray.cli import run_job
from capsfusion_ray.training.average import AverageConfig, average

if __name__ == "__main__":
    sys.exit(run_job(AverageConfig, average))
