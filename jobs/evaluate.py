"""`python jobs/evaluate.py …` is `capsfusion evaluate …`: the file that `ray job submit` starts."""

import sys

from capsfusion_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
