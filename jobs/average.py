"""`python jobs/average.py …` is `capsfusion average …`: the file that `ray job submit` starts."""

import sys

from capsfusion_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["average", *sys.argv[1:]]))
