"""Train a fusion model on caption triples: python jobs/train.py conf/train/….yaml data.path=… output.path=…"""

import sys

from capsfusion_ray.doorway import run_job
from capsfusion_ray.train.config import TrainConfig
from capsfusion_ray.train.job import train

if __name__ == "__main__":
    sys.exit(run_job(TrainConfig, train))
