"""jobs/label.py as a user runs it: a teacher that fails often, a cost cap that ends the run, the same command again, and labels to train on."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from teacher import KEY, Teacher

from capsfusion_ray.training.config import TripleConfig
from capsfusion_ray.training.triples import read_triples

ROOT = Path(__file__).resolve().parents[2]
PRICES = ["engine.api.prompt_price=10", "engine.api.output_price=100"]  # an answer costs 0.002 dollars
FAULTS = ["truncated", "reset", 500, (429, [("Retry-After", "0.05")]), b'{"choices": [', {"choices": []}]


def raw_caption(prompt):
    return re.search(r"^Sentence 1: (.*)$", prompt, re.MULTILINE)[1]


@pytest.fixture
def teacher():
    """A teacher that fails at the first request for one row in three, each time in another way, and answers well after that."""

    def script(row, number):
        serial = int(re.search(r"\d+", row)[0])
        return FAULTS[serial // 3 % len(FAULTS)] if number == 1 and serial % 3 == 0 else "good"

    server = Teacher(script, raw_caption, lambda raw: f"{raw}, is a white lighthouse that stands on a rocky coast.")
    yield server
    server.close()


def label(*arguments):
    """The exit code, the object of the last line where the code is 0, and stdout with stderr."""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env |= {"RAY_AUTH_MODE": "disabled", "CAPSFUSION_API_KEY": KEY, "NO_PROXY": "127.0.0.1"}
    ended = subprocess.run(
        [sys.executable, "jobs/label.py", *map(str, arguments)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    lines = ended.stdout.splitlines()
    return ended.returncode, json.loads(lines[-1]) if ended.returncode == 0 else None, ended.stdout + ended.stderr


@pytest.mark.timeout(1800)
def test_labelling_with_a_teacher_that_fails_stops_at_the_cap_and_resumes_with_a_higher_one(teacher, corpus, tmp_path):
    output = tmp_path / "labels"
    command = [
        f"input.path={corpus}",
        f"output.path={output}",
        "unit.rows=25",
        "engine.api.concurrency=8",
        f"engine.api.url={teacher.url}",
        "engine.api.model=teacher-1",
        *PRICES,
    ]
    code, _, said = label(*command, "engine.api.max_dollars=0.3")
    assert code == 1, said[-3000:]
    assert "max_dollars" in said
    asked = sum(teacher.tries.values())
    assert 0.3 / 0.002 <= asked < 250, "it stops at the cap, and not long before or after it"

    code, summary, again = label(*command, "engine.api.max_dollars=10")
    assert code == 0, again[-3000:]
    assert 0 < summary["resumed_units"] < summary["units"]
    rows = [row for file in (output / "data").rglob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert len(rows) == 400
    assert all(
        row["capsfusion"] == f"{row['laion_2b']}, is a white lighthouse that stands on a rocky coast." for row in rows
    )

    assert KEY not in said + again
    kept = [path.read_bytes() for path in output.rglob("*") if path.is_file()]
    assert not [data for data in kept if KEY.encode() in data]

    assert summary["train"].startswith(
        "capsfusion train conf/train/finetune.yaml model.path=<hub id or folder> data.path="
    )
    triples, held_out = read_triples(TripleConfig(path=str(output), fused="capsfusion", validation_rows=100))
    assert (len(triples), len(held_out)) == (300, 100)
