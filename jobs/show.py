"""Show a finished output in the terminal: `python jobs/show.py output.path=out/demo [count=8]`."""

from __future__ import annotations

import sys

from capsfusion_ray.cli import helped
from capsfusion_ray.config import load
from capsfusion_ray.errors import CapsFusionError, UsageError
from capsfusion_ray.reports.terminal import ShowConfig, show


def main(argv: list[str]) -> int:
    if helped(ShowConfig, argv):
        return 0
    try:
        config = load(ShowConfig, argv)
        show(config.output.path, config.count, sys.stdout, config.output.storage)
    except UsageError as error:
        print(f"show: {error}", file=sys.stderr)
        return 2
    except CapsFusionError as error:
        print(f"show: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
