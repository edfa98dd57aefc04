"""Train a fusion model on caption triples: python jobs/train.py conf/train/….yaml data.path=… output.path=…"""

import sys

from capsfusion_ray.cli import run_job
from capsfusion_ray.training.config import TrainConfig
from capsfusion_ray.training.job import train

if __name__ == "__main__":
    sys.exit(run_job(TrainConfig, train))
