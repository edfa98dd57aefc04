"""Three hosts, one of which loses its power and one its network while they fuse: the job ends well, and nothing shows in its output.

The hosts are namespaces of this machine (see hosts.py); the store is a server that all of them reach. Each holds one actor.
"""

import io
import json
import os
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from echo_run import fuse_here
from hosts import Host, host, switch, wait_until_gone, why_not
from lighthouses import captions
from moto_server import KEYS, client, moto_server
from proxy import FaultProxy, Faults

from capsfusion_ray.config import FuseConfig, parse_config

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "captions"
OUT = f"output.path=s3://{BUCKET}/out"
SHARDS, SHARD_ROWS, UNIT_ROWS = "abc", 200, 10
UNITS = len(SHARDS) * SHARD_ROWS // UNIT_ROWS
HOSTS = ("one", "two", "three")
GCS_PORT = 6379
# A host has room for one actor and what reads and commits.
NODE = ["--block", "--num-cpus=2", f"--object-store-memory={100 << 20}", "--disable-usage-stats"]
SETTINGS = ["engine.kind=echo", f"unit.rows={UNIT_ROWS}", "source.passthrough=[width]"]
ACTORS = ["cluster.min_actors=3", "cluster.max_actors=3", "cluster.cpus_per_actor=1.2"]
# A host that falls silent answers nothing, not even that it is gone: Ray waits for the tasks it sent there until gRPC's keepalive
# gives up, 5 minutes and 2 by default.
KEEPALIVE = {"RAY_grpc_client_keepalive_time_ms": "20000", "RAY_grpc_client_keepalive_timeout_ms": "20000"}
# A unit's last request from its actor is a deletion: so long it stays there, takes no CPU, and hosts that start late get some.
SLOW = Faults(1.0, ("stall",), frozenset(["DeleteObject"]), stall_s=10.0)

if reason := why_not():
    pytest.skip(f"no hosts in namespaces here: {reason}", allow_module_level=True)
pytestmark = pytest.mark.timeout(1200)


@dataclass
class Cluster:
    """Ray on three hosts; drivers run on the first, which is the head."""

    hosts: tuple[Host, ...]
    s3: object
    proxy: FaultProxy
    env: dict[str, str]
    folder: Path

    def command(self, job, *args):
        return (
            [sys.executable, f"jobs/{job}.py", *args],
            self.folder / f"{job}-{time.monotonic_ns()}.log",
            self.env,
            ROOT,
        )

    def run(self, job, *args):
        """The job's JSON line."""
        said = self.hosts[0].run(*self.command(job, *args)).splitlines()
        return json.loads(next(line for line in reversed(said) if line.startswith("{")))

    def keys(self, prefix):
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]

    def read(self, key):
        return self.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def rows(self, output):
        """Every row of the dataset and of the rejects, by its id; fails where an id stands twice."""
        keys = [key for folder in ("data", "rejected") for key in self.keys(f"{output}/{folder}/")]
        return by_id(pq.ParquetFile(io.BytesIO(self.read(key))).read() for key in keys)

    def committed(self):
        """The summaries of all units that are done: those with a part, and those of compacted groups; by unit id."""
        units = []
        for key in self.keys("out/_units/"):
            with suppress(self.s3.exceptions.NoSuchKey):  # compacted meanwhile: then its group is there, below
                units.append(json.loads(pq.read_schema(io.BytesIO(self.read(key))).metadata[b"capsfusion_unit"]))
        for key in self.keys("out/_run/groups/"):
            units += json.loads(self.read(key))["units"]
        return {unit["id"]: unit for unit in units}


def by_id(tables):
    rows = [row for table in tables for row in table.to_pylist()]
    found = {row["row_id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.fixture(scope="module")
def shards():
    return {f"{shard}.parquet": pa.Table.from_pylist(captions(shard, SHARD_ROWS)) for shard in SHARDS}


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """The rows of the same run where nothing happens: in this process, without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "in").mkdir()
    for name, table in shards.items():
        pq.write_table(table, folder / "in" / name)
    fuse_here(
        parse_config(FuseConfig, [f"input.path={folder / 'in'}", f"output.path={folder / 'out'}", *SETTINGS]), UNIT_ROWS
    )
    files = [path for kind in ("data", "rejected") for path in (folder / "out" / kind).rglob("*.parquet")]
    return by_id(pq.ParquetFile(path).read() for path in files)


@pytest.fixture(scope="module")
def cluster(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    with switch() as address, moto_server(folder / "moto.log") as server, FaultProxy(server, address) as proxy:
        s3 = client("s3", server)
        s3.create_bucket(Bucket=BUCKET)
        for name, table in shards.items():
            file = io.BytesIO()
            pq.write_table(table, file, row_group_size=UNIT_ROWS)
            s3.put_object(Bucket=BUCKET, Key=f"in/{name}", Body=file.getvalue())
        kept = {
            name: value for name, value in os.environ.items() if name != "RAY_ADDRESS" and not name.startswith("AWS_")
        }
        env = (
            kept
            | KEEPALIVE
            | {
                "AWS_ENDPOINT_URL": proxy.url,
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": KEYS["key"],
                "AWS_SECRET_ACCESS_KEY": KEYS["secret"],
                "RAY_AUTH_MODE": "disabled",
                "LOG_LEVEL": "INFO",
            }
        )
        proxy.inject(SLOW)
        with ExitStack() as stack:
            hosts = tuple(stack.enter_context(host(name, number)) for number, name in enumerate(HOSTS, 1))
            gcs = f"{hosts[0].address}:{GCS_PORT}"
            for each in hosts:
                place = (
                    [f"--address={gcs}"]
                    if each is not hosts[0]
                    else ["--head", f"--port={GCS_PORT}", "--include-dashboard=false"]
                )
                # A short path: Ray's sockets lie below it.
                place += [
                    f"--node-ip-address={each.address}",
                    f"--temp-dir={tmp_path_factory.getbasetemp() / each.name}",
                    *NODE,
                ]
                log = folder / f"ray-{each.name}.log"
                node = each.start([sys.executable, "tests/support/ray_start.py", *place], log, env, ROOT)
                wait_for(partial(is_up, node, log), f"Ray on {each.name}")
            yield Cluster(hosts, s3, proxy, env | {"RAY_ADDRESS": gcs}, folder)
        wait_until_gone(hosts)


def is_up(node, log):
    assert node.poll() is None, log.read_text()
    return "Ray runtime started." in log.read_text()


def wait_for(seen, what, patience_s=600):
    until = time.monotonic() + patience_s
    while not seen():
        assert time.monotonic() < until, f"no sign of it in {patience_s} s: {what}"
        time.sleep(1.0)


def test_a_host_killed_and_a_host_cut_off_leave_the_rows_of_an_undisturbed_run(cluster, undisturbed):
    one, two, three = cluster.hosts
    line, log, *rest = cluster.command("fuse", f"input.path=s3://{BUCKET}/in", OUT, *SETTINGS, *ACTORS)
    fusing = one.start(line, log, *rest)

    def each_has_fused(units):
        assert fusing.poll() is None, log.read_text()[-5000:]
        done = cluster.committed()
        return len(done) >= units and {unit["device"].split(":")[0] for unit in done.values()} == set(HOSTS)

    wait_for(lambda: each_has_fused(UNITS // 4), "units of all three hosts")
    three.unplug()
    two.kill()
    lost_at = len(cluster.committed())
    assert lost_at < UNITS
    cluster.proxy.inject(Faults())
    assert fusing.wait() == 0, log.read_text()[-5000:]
    by_host = Counter(unit["device"].split(":")[0] for unit in cluster.committed().values())
    print(f"lost after {lost_at} of {UNITS} units; fused by host: {dict(by_host)}")
    assert cluster.rows("out") == undisturbed

    # The host that was cut off in the middle of its units comes back, too late for them. Its raylet ends, if it did not before.
    three.plug()
    wait_for(lambda: not three.processes("raylet"), "the end of the raylet that was given up")
    assert cluster.run("verify", OUT, "deep=true")["rows"]["planned"] == len(undisturbed) == len(SHARDS) * SHARD_ROWS
    assert cluster.rows("out") == undisturbed
