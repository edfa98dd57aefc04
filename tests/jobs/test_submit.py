"""The fuse job submitted through the dashboard of a cluster: a head and two workers, input and output on an S3 server."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lighthouses import captions
from moto_server import KEYS, client, moto_server
from proxy import FaultProxy, Faults
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_actors
from ray_nodes import ray_nodes

from capsfusion_ray.cli import EXIT_DONE, EXIT_USAGE, run_job
from capsfusion_ray.config import VerifyConfig
from capsfusion_ray.dataset.verify import verify

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "captions"
ROWS, UNIT_ROWS = 240, 5
MAX_ACTORS = 3
GRACE_S = 300
FUSION_ACTOR = "MapWorker(MapBatches(FusionActor))"  # as Ray Data names it
SECRETS = {"key": "AKIA0FTH1STEST", "secret": "S3cr3t-0f-th1s-test", "token": "T0ken-0f-th1s-test"}
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """An S3 server behind a proxy that can make it slow, and 240 captions in it."""
    with moto_server(tmp_path_factory.mktemp("moto") / "log.txt") as server, FaultProxy(server) as proxy:
        s3 = client("s3", server)
        s3.create_bucket(Bucket=BUCKET)
        for shard in "ab":
            file = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(captions(shard, ROWS // 2)), file, row_group_size=40)
            s3.put_object(Bucket=BUCKET, Key=f"in/{shard}.parquet", Body=file.getvalue())
        proxy.server = server
        yield proxy


@pytest.fixture(scope="module")
def nodes(store):
    """The cluster. Its processes have the credentials of the bucket in their environment, as pods do."""
    aws = {
        "AWS_ENDPOINT_URL": store.url,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": KEYS["key"],
        "AWS_SECRET_ACCESS_KEY": KEYS["secret"],
        "RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "15",  # until then the CPUs that a killed driver asked for are missing to the next one
    }
    with ray_nodes(2, 2, env=aws) as nodes:
        yield nodes


def slow(seconds):
    """Delay every deletion: an actor's last request for a unit is one, so the actor is kept busy so long, without CPU."""
    return Faults(1.0, ("stall",), frozenset(["DeleteObject"]), stall_s=seconds)


class Submission:
    """One `capsfusion submit` as a process."""

    def __init__(self, nodes, *args):
        line = [sys.executable, "-m", "capsfusion_ray", "submit", f"address={nodes.dashboard}", "fuse", *args]
        env = os.environ | {"RAY_ADDRESS": "http://127.0.0.1:1", "RAY_AUTH_MODE": "disabled"}  # the address wins
        self.process = subprocess.Popen(
            line, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    @property
    def ended(self):
        return self.process.poll() is not None

    def result(self, code=EXIT_DONE):
        """Wait for the job, which must end with `code`; its JSON line, or for another code than 0 all its output."""
        said = self.process.communicate(timeout=900)[0]
        assert self.process.returncode == code, f"exit {self.process.returncode}, wanted {code}\n{said[-5000:]}"
        return (
            next(json.loads(line) for line in said.splitlines() if line.startswith('{"rows"'))
            if code == EXIT_DONE
            else said
        )


def fuse(output, *more):
    return (
        f"input.path=s3://{BUCKET}/in",
        f"output.path=s3://{BUCKET}/{output}",
        "engine.kind=echo",
        f"unit.rows={UNIT_ROWS}",
        "cluster.cpus_per_actor=0.5",
        *more,
    )


def keys(store, prefix):
    pages = client("s3", store.server).get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return [item["Key"] for page in pages for item in page.get("Contents", ())]


def read(store, key):
    return client("s3", store.server).get_object(Bucket=BUCKET, Key=key)["Body"].read()


def verify_all(store, output):
    """`verify` must exit 0, and every row id of the input must be in the output once, which is checked without `verify`."""
    storage = f"output.storage={{endpoint_url: '{store.server}', key: {KEYS['key']}, secret: {KEYS['secret']}, region: us-east-1}}"
    assert run_job(VerifyConfig, verify, [f"output.path=s3://{BUCKET}/{output}", "deep=true", storage]) == EXIT_DONE
    files = [key for folder in ("data", "rejected") for key in keys(store, f"{output}/{folder}/")]
    tables = [pq.ParquetFile(io.BytesIO(read(store, key))).read(["row_id"]) for key in files]
    ids = [row_id for table in tables for row_id in table["row_id"].to_pylist()]
    assert sorted(ids) == sorted(f"{shard}.parquet:{i}" for shard in "ab" for i in range(ROWS // 2))


class Pool(list):
    """The numbers of living actors over time, as the cluster reports them."""

    def __init__(self, nodes):
        super().__init__([0])
        self._nodes = nodes

    def look(self):
        alive = list_actors(
            address=self._nodes.dashboard, filters=[("class_name", "=", FUSION_ACTOR), ("state", "=", "ALIVE")]
        )
        if len(alive) != self[-1]:
            self.append(len(alive))


def test_killed_and_submitted_again_it_loses_nothing_and_its_pool_grows_and_shrinks(store, nodes):
    """SIGKILL to the driver on the head after a few commits; the same job resumes with more actors."""
    store.inject(slow(1.0))
    first = Submission(nodes, *fuse("out", "cluster.max_actors=1"))
    refused = Submission(nodes, *fuse("out", "output.target_file_md=1"))
    while len(keys(store, "out/_units/")) < 2:
        assert not first.ended, first.result()
        time.sleep(0.1)
    driver = psutil.Process(json.loads(read(store, "out/_run/lease.json"))["pid"])
    assert "jobs/fuse.py" in driver.cmdline()
    driver.send_signal(signal.SIGKILL)
    assert "output.target_file_mb" in refused.result(code=EXIT_USAGE), "the exit code of the job itself, within seconds"
    first.result(code=128 + signal.SIGKILL)

    store.inject(slow(5.0))
    again = Submission(nodes, *fuse("out", f"cluster.max_actors={MAX_ACTORS}"))
    pool = Pool(nodes)
    while not again.ended:
        pool.look()
        if MAX_ACTORS in pool:
            store.inject(Faults())
        time.sleep(0.1)
    totals = again.result()
    assert 0 < totals["resumed_units"] < totals["units"] == ROWS // UNIT_ROWS
    print("actors alive, over time:", pool)
    assert pool[:2] == [0, 1]
    assert max(pool) == MAX_ACTORS
    assert min(pool[pool.index(MAX_ACTORS) :]) < MAX_ACTORS, "before the driver ended"
    verify_all(store, "out")


def test_a_secret_on_the_command_line_is_stored_nowhere(store, nodes):
    """Neither in the messages, nor in the output, the logs of the cluster or its list of jobs; and submit refuses it."""
    store.inject(Faults())
    storage = SECRETS | {"endpoint_url": store.url, "region": "us-east-1"}
    words = fuse(
        "secret",
        *(
            f"{section}.storage.{name}={value}"
            for section in ("input", "output", "engine")
            for name, value in storage.items()
        ),
    )
    env = os.environ | {"RAY_ADDRESS": nodes.gcs, "RAY_AUTH_MODE": "disabled"}
    ran = subprocess.run(
        [sys.executable, "jobs/fuse.py", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900
    )
    assert ran.returncode == EXIT_DONE, ran.stderr[-5000:]
    said = Submission(nodes, *words).result(code=EXIT_USAGE)
    assert "input.storage.secret=*** " in said
    entrypoints = [
        str(job) for job in JobSubmissionClient(nodes.dashboard).list_jobs() if "s3://captions/secret" in str(job)
    ]
    assert len(entrypoints) == 1
    assert "output.storage.secret=***" in entrypoints[0]
    written = {key: read(store, key) for key in keys(store, "secret/")}
    logs = {path: path.read_bytes() for path in nodes.session.rglob("*") if path.is_file()}
    assert len(written) > 5
    assert len(logs) > 20
    for secret in SECRETS.values():
        assert secret not in ran.stdout + ran.stderr + said + "".join(entrypoints)
        assert not [place for place, data in (written | logs).items() if secret.encode() in data]


def test_credentials_that_expire_end_the_run_and_renewed_ones_resume_it(store, nodes):
    store.inject(slow(1.0))
    first = Submission(nodes, *fuse("expired", "cluster.max_actors=1"))
    while len(keys(store, "expired/_units/")) < 2:
        assert not first.ended, first.result()
        time.sleep(0.1)
    store.inject(Faults(1.0, ("expired",)))
    said = first.result(code=EXIT_USAGE)
    assert "error: s3://captions/" in said, "of its input or its output, whichever was asked for next"
    assert re.search(r"credentials not accepted \((ExpiredToken|400)\); check storage key and secret, or AWS_\*", said)
    store.inject(Faults())
    totals = Submission(nodes, *fuse("expired", "cluster.max_actors=1")).result()
    assert 0 < totals["resumed_units"] < totals["units"]
    verify_all(store, "expired")


def test_an_actor_leaves_a_drained_node_in_time_and_no_row_is_suspected(store, nodes):
    """Ray drains a node that got SIGTERM: the actor there begins no further unit and ends before the node does."""
    store.inject(slow(1.0))
    run = Submission(
        nodes, *fuse("drained", "cluster.min_actors=2", "cluster.max_actors=2", "cluster.cpus_per_actor=1")
    )
    alive = [("class_name", "=", FUSION_ACTOR), ("state", "=", "ALIVE")]
    while len(
        homes := {actor.node_id for actor in list_actors(address=nodes.dashboard, filters=alive)}
    ) < 2 or not keys(store, "drained/_units/"):
        assert not run.ended, run.result()
        time.sleep(0.2)
    gone = homes.pop()
    until_ms = int((time.time() + GRACE_S) * 1000)
    accepted, why = GcsClient(address=nodes.gcs).drain_node(
        gone, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "a test wants it back", until_ms
    )
    assert accepted, why
    began = time.monotonic()
    while [actor for actor in list_actors(address=nodes.dashboard, filters=alive) if actor.node_id == gone]:
        assert time.monotonic() - began < GRACE_S, "the actor stayed until its node was gone"
        time.sleep(0.2)
    store.inject(Faults())
    said = run.process.communicate(timeout=900)[0]
    assert run.process.returncode == EXIT_DONE, said[-5000:]
    assert "no further unit begins here" in said
    assert "this actor ends before its node: 0 units are fused elsewhere" in said
    assert "runs alone" not in said
    verify_all(store, "drained")
