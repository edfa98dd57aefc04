"""`python jobs/plan.py …` is `capsfusion plan …`: the file that `ray job submit` starts."""

import sys

from capsfusion_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
