"""Outputs that version 0.1 of the code left: one begun, one finished. A test works on a copy of them."""

from __future__ import annotations

import shutil
from pathlib import Path

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "output_of_0_1"
# Their settings, as words of the command. Their leases are of another machine and were never released.
SETTINGS = (
    "engine.kind=echo",
    "source.passthrough=[lang,punsafe]",
    "filter.max_punsafe=0.9",
    "unit.rows=10",
    "output.max_shard_groups=2",
    "gates.cut_off={action: reject, threshold: 1, flag_from: null}",
    "cluster.max_actors=1",
    "takeover=true",
)


def copy_of(name: str, folder: Path) -> list[str]:
    """Copy the output `name` (begun or finished) into `folder`, with its input beside it; the words that resume it there."""
    for each in ("captions", name):
        shutil.copytree(FIXTURE / each, folder / each)
    return [f"input.path={folder / 'captions'}", f"output.path={folder / name}", *SETTINGS]
