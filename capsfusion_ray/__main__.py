"""`python -m capsfusion_ray <job> …`: the command, where its script is not on the PATH."""

import sys

from capsfusion_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
