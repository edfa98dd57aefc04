"""A corpus, and one real Ray cluster for all job tests: drivers join it as processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lighthouses import captions

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def corpus(tmp_path):
    """Four shards of different sizes, two of the same name in different folders: 400 rows."""
    folder = tmp_path / "in"
    for path, count in (("a/part-0", 150), ("b/part-0", 50), ("c", 120), ("d", 80)):
        file = folder / f"{path}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(captions(path.replace("/", "-"), count)), file, row_group_size=64)
    return folder


HEAD = """
import sys, ray
from capsfusion_ray.cluster import start_here
start_here(num_cpus=3, log_to_driver=False)
print("address", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def ray_address():
    """A head node with 3 logical CPUs, which ends when its standard input does."""
    head = subprocess.Popen([sys.executable, "-c", HEAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    lines = iter(head.stdout.readline, "")
    yield next(line.split()[1] for line in lines if line.startswith("address"))
    head.stdin.close()
    head.wait(120)


class Driver:
    """`python jobs/<job>.py …` as a process of its own."""

    def __init__(self, address):
        self.env = os.environ | {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled", "LOG_LEVEL": "INFO"}

    def start(self, job, *args):
        command = [sys.executable, f"jobs/{job}.py", *map(str, args)]
        return subprocess.Popen(command, cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, job, *args, code=0):
        process = self.start(job, *args)
        out, err = process.communicate(timeout=1500)
        assert process.returncode == code, f"exit {process.returncode}, wanted {code}\n{err[-3000:]}"
        return json.loads(out.splitlines()[-1]) if code == 0 else err


@pytest.fixture
def driver(ray_address):
    return Driver(ray_address)
