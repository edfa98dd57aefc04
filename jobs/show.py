"""`python jobs/show.py …` is `capsfusion show …`: the file that `ray job submit` starts."""

import sys

from capsfusion_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["show", *sys.argv[1:]]))
