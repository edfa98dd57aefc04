"""jobs/takedown.py as a user runs it, killed by SIGKILL: the same command finishes it, and jobs/verify.py exits 0."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from outputs import run_of

from capsfusion_ray.config import OutputConfig
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.storage import Store

ROOT = Path(__file__).resolve().parents[2]
GROUPS = 100
MAX_SECONDS = 600


def started(job, *args):
    command = [sys.executable, f"jobs/{job}.py", *args]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process):
    """The last line of a process that exits 0."""
    out, err = process.communicate(timeout=MAX_SECONDS)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def rewritten(out):
    """How many groups have a new edition."""
    return len(list((out / "_run/groups").glob("*-e002.json")))


def test_a_takedown_killed_three_times_is_finished_by_the_same_command(tmp_path):
    out = tmp_path / "out"
    output = OutputConfig(str(out), target_file_rows=4)
    units = [WorkUnit(f"u{i}", f"s{i}.parquet", 0, 8, f"g{i:05d}") for i in range(GROUPS)]
    run_of(Store(output.path), units, ["fused", "rejected", "kept", "fused"] * 2, output)
    (tmp_path / "ids").write_text("".join(f"s{i}.parquet:{row}\n" for i in range(GROUPS) for row in (0, 1, 2)))
    command = ("takedown", f"output.path={out}", f"row_ids={tmp_path / 'ids'}")
    found = []
    for enough in (1, GROUPS // 3, 2 * GROUPS // 3):
        process = started(*command)
        while process.poll() is None and rewritten(out) < enough:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was over before its kill"
        found.append(rewritten(out))
    print("groups rewritten at each kill", found, "of", GROUPS)
    assert ended(started(*command))["removed"] == 3 * GROUPS
    rows = ended(started("verify", f"output.path={out}", "deep=true"))["rows"]
    assert (rows["planned"], rows["removed"]) == (8 * GROUPS, 3 * GROUPS)
    assert (rows["fused"], rows["rejected"], rows["kept"]) == (3 * GROUPS, GROUPS, GROUPS)
