"""`python jobs/label.py …` is `capsfusion label …`: the file that `ray job submit` starts."""

import sys

from capsfusion_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["label", *sys.argv[1:]]))
