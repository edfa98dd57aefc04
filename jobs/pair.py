"""`python jobs/pair.py …` is `capsfusion pair …`: the file that `ray job submit` starts."""

import sys

from capsfusion_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["pair", *sys.argv[1:]]))
