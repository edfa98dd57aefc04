"""Figures of a model or an output beside the baselines: python jobs/evaluate.py data.path=… [engine.model=… | fused=…]"""

import sys

from capsfusion_ray.cli import run_job
from capsfusion_ray.training.evaluate import EvaluateConfig, evaluate

if __name__ == "__main__":
    sys.exit(run_job(EvaluateConfig, evaluate))
