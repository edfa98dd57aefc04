"""Join raw and synthetic captions of two tables: python jobs/pair.py raw.path=… synthetic.path=… output.path=… [normalise=url]"""

import sys

from capsfusion_ray.cli import run_job
from capsfusion_ray.pairing.job import PairConfig, pair

if __name__ == "__main__":
    sys.exit(run_job(PairConfig, pair))
