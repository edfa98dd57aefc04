"""`python jobs/takedown.py …` is `capsfusion takedown …`: the file that `ray job submit` starts."""

import sys

from capsfusion_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["takedown", *sys.argv[1:]]))
