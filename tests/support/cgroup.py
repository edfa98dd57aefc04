"""A cgroup without memory: a process that is put into it is killed by the kernel at one of its next allocations."""

from __future__ import annotations

import os
from pathlib import Path

TIGHT_BYTES = 1 << 16  # of new pages; what a process holds already is not counted


def tight_cgroup() -> Path | None:
    """This program's own, made on first use, which `rmdir()` removes; None where that is not permitted."""
    try:
        paths = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
        one = "memory" in paths  # cgroup v1 has a tree of its own for memory
        parent = Path("/sys/fs/cgroup", "memory" if one else "", paths["memory" if one else ""].lstrip("/"))
        cgroup = parent / f"tight-{os.getpid()}"
        cgroup.mkdir(exist_ok=True)
    except (OSError, KeyError):
        return None
    try:
        (cgroup / ("memory.limit_in_bytes" if one else "memory.max")).write_text(str(TIGHT_BYTES))
    except OSError:  # a cgroup v2 whose parent does not hand its memory down
        cgroup.rmdir()
        return None
    return cgroup


def put_into(cgroup: Path, pid: int) -> None:
    (cgroup / "cgroup.procs").write_text(str(pid))
