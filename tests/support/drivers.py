"""Run `python jobs/<job>.py …` as processes, kill them where asked, and start a Ray cluster for them to join."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capsfusion_ray.dataset.manifest import read_groups
from capsfusion_ray.dataset.unit_files import committed
from capsfusion_ray.storage import Store

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
import sys, ray
from capsfusion_ray.run.private_cluster import patient_start
with patient_start():  # not start_here: no other process can join what that starts
    ray.init("local", include_dashboard=False, num_cpus=3, log_to_driver=False)
print("address", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def ray_head() -> Iterator[str]:
    """The address of a head node with 3 logical CPUs. It ends when its standard input is closed."""
    # A test of this process may have started a cluster of its own, whose token stands in the environment.
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=env | {"RAY_AUTH_MODE": "disabled"},
    )
    assert head.stdin
    assert head.stdout
    lines = iter(head.stdout.readline, "")
    try:
        yield next(line.split()[1] for line in lines if line.startswith("address"))
    finally:
        head.stdin.close()
        head.wait(120)


class Driver:
    """Starts jobs that join the cluster at `address`."""

    def __init__(self, address: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
        self.env = clean | {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled", "LOG_LEVEL": "INFO"}

    def start(self, job: str, *args: object) -> subprocess.Popen[str]:
        command = [sys.executable, f"jobs/{job}.py", *map(str, args)]
        return subprocess.Popen(
            command, cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, job: str, *args: object, code: int = 0) -> Any:
        """Run a job that must end with exit code `code`; its result, or its stderr where the code is not 0."""
        process = self.start(job, *args)
        out, err = process.communicate(timeout=1500)
        assert process.returncode == code, f"exit {process.returncode}, wanted {code}\n{err[-3000:]}"
        return json.loads(out.splitlines()[-1]) if code == 0 else err

    def kill_at(self, seen: Callable[[], int], enough: float, job: str, *args: object, later_s: float = 0.0) -> int:
        """Start a job and SIGKILL it `later_s` after `seen()` has reached `enough`; the value of `seen()` then."""
        process = self.start(job, *args)
        while process.poll() is None and seen() < enough:
            time.sleep(0.001)
        time.sleep(later_s)
        assert process.poll() is None, "the job was over before its kill"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return seen()

    def kill_fuse(self, store: Store, kills: int, units: int, *args: object) -> list[int]:
        """SIGKILL `kills` runs of `units` units on `store`, each at a random moment after its first commit.

        Returns how many units a resume finds after each kill.
        """
        chance = random.Random(7)
        found: list[int] = []
        while len(found) < kills:
            before = resumable(store)
            enough = before + 1 + chance.random() * (units - before) / (kills - len(found) + 1)
            found.append(self.kill_at(lambda: resumable(store), enough, "fuse", *args, later_s=chance.uniform(0, 0.1)))
        print("units found after each kill", found, "of", units)
        return found


def resumable(store: Store) -> int:
    """How many units a resume finds: those with a part, and those of compacted groups."""
    parts = committed(store)  # read first: parts are deleted once the entry of their group exists
    return len(parts | {unit.id for group in read_groups(store) for unit in group.units})
