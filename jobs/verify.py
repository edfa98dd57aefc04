"""`python jobs/verify.py …` is `capsfusion verify …`: the file that `ray job submit` starts."""

import sys

from capsfusion_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
