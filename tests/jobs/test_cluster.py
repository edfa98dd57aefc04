"""Joining a cluster: one that is gone, a SIGTERM while Ray starts, and the model on every node before the pool starts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drivers import Driver, ray_head, resumable
from lighthouses import captions
from moto_server import client, moto_server, options
from ports import free_port
from ray_nodes import ray_nodes

from capsfusion_ray.cli import EXIT_FAILED, EXIT_USAGE, run_job
from capsfusion_ray.config import ClusterConfig, EngineConfig, FuseConfig, VllmConfig
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.models.cache import FOLDER
from capsfusion_ray.models.content import content_hash
from capsfusion_ray.models.location import EMBEDDED
from capsfusion_ray.run import cluster
from capsfusion_ray.run.driver import fuse
from capsfusion_ray.run.pool import Resources, resolve_pool
from capsfusion_ray.run.private_cluster import TOKEN_FILE
from capsfusion_ray.storage import Store

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / EMBEDDED


@pytest.fixture
def shard(tmp_path):
    pq.write_table(pa.Table.from_pylist(captions("a", 12)), tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


@pytest.mark.parametrize(
    "address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "http://127.0.0.1:{}", "no-address", "no-such-host.invalid:{}"]
)
def test_a_cluster_that_is_gone_is_an_error_of_one_line_within_seconds(address, shard, tmp_path, monkeypatch, capsys):
    address = address.format(free_port())
    monkeypatch.setattr(cluster, "ANSWER_PATIENCE_S", 0.3)
    monkeypatch.setenv("RAY_ADDRESS", address)
    handler = signal.getsignal(signal.SIGTERM)
    began = time.monotonic()
    code = run_job(FuseConfig, fuse, [f"input.path={shard}", f"output.path={tmp_path / 'out'}", "engine.kind=echo"])
    assert signal.getsignal(signal.SIGTERM) is handler, "the caller's handler is back"
    assert (code, time.monotonic() - began < 25) == (EXIT_USAGE, True)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: RAY_ADDRESS={address}: ")
    assert line.endswith("or unset it to run on this machine alone")


def test_an_empty_address_joins_no_cluster(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert cluster.named_cluster(ClusterConfig()) == ""
    assert cluster.named_cluster(ClusterConfig(address="head:6379")) == "cluster.address=head:6379"


@pytest.mark.parametrize("daemon", ["gcs_server", "raylet"])
def test_a_sigterm_while_ray_starts_ends_with_a_message_and_leaves_no_process_and_no_token(daemon, shard, tmp_path):
    (tmp_path / "temporary").mkdir()
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env |= {"TMPDIR": str(tmp_path / "temporary"), "RAY_TMPDIR": "/tmp"}  # Ray's sockets need a short path
    command = [
        sys.executable,
        "jobs/fuse.py",
        f"input.path={shard}",
        f"output.path={tmp_path / 'out'}",
        "engine.kind=echo",
    ]
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
        started = wait_for_child(process, daemon)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=300)
    assert process.returncode == EXIT_FAILED, err
    assert err.strip().endswith("interrupted; everything committed is kept, the same command again resumes")
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive
    assert not list((tmp_path / "temporary").rglob(TOKEN_FILE))


def wait_for_child(process, name):
    """The child processes of `process`, as soon as one of them has this name."""
    while process.poll() is None:
        below = psutil.Process(process.pid).children(recursive=True)
        for child in below:
            try:
                if child.name() == name:
                    return below
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.02)
    raise AssertionError(f"it ended before {name} began: {process.stderr.read()}")


@pytest.mark.timeout(1800)
def test_a_head_that_is_lost_ends_the_run_and_another_cluster_resumes_it(corpus, tmp_path, monkeypatch):
    """SIGKILL to all processes of the head node while units are in flight: the driver, which is elsewhere, must not wait for ever."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")  # a minute by default
    output = Store(str(tmp_path / "out"))
    words = [
        f"input.path={corpus}",
        f"output.path={output.root}",
        "engine.kind=echo",
        "unit.rows=5",
        "cluster.max_actors=1",
    ]
    with ray_head() as address:
        run = Driver(address).start("fuse", *words)
        while not resumable(output):
            assert run.poll() is None, run.communicate()[1]
            time.sleep(0.01)
        port = int(address.rpartition(":")[2])
        (gcs,) = {
            c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port
        }
        head = psutil.Process(gcs).parent()
        for process in [*head.children(recursive=True), head]:
            process.kill()
        assert run.poll() is None, "the run was over before its head was lost"
        _, said = run.communicate(timeout=300)
    assert run.returncode not in (0, EXIT_USAGE), said
    found = resumable(output)
    with ray_head() as address:
        driver = Driver(address)
        totals = driver.run("fuse", *words)
        assert 0 < found <= totals["resumed_units"] < totals["units"]
        assert driver.run("verify", f"output.path={output.root}", "deep=true")["rows"]["planned"] == 400


def test_only_vllm_takes_several_gpus_and_as_many_as_it_splits_a_model_over():
    eight = Resources(64, 8, here=False)
    two = EngineConfig(kind="vllm", vllm=VllmConfig(tensor_parallel=2))
    pool = resolve_pool(ClusterConfig(), two, eight, units=100)
    assert (pool.gpus_per_actor, pool.max_actors) == (2, 4)
    with pytest.raises(ConfigError, match=r"engine\.kind=beam uses one GPU per actor.*tensor_parallel"):
        resolve_pool(ClusterConfig(gpus_per_actor=2), EngineConfig(), eight, units=100)
    with pytest.raises(ConfigError, match="give the same number"):
        resolve_pool(ClusterConfig(gpus_per_actor=1), two, eight, units=100)
    with pytest.raises(ConfigError, match=r"engine\.kind=beam holds a model on one GPU"):
        EngineConfig(vllm=VllmConfig(tensor_parallel=2))
    assert resolve_pool(ClusterConfig(gpus_per_actor=0.5), EngineConfig(), eight, units=100).max_actors == 16


@pytest.mark.timeout(1800)
def test_every_node_has_the_model_of_a_bucket_before_the_pool_starts(shard, tmp_path):
    home = tmp_path / "hf"
    with moto_server(tmp_path / "log.txt") as server, ray_nodes(2, 2, env={"HF_HOME": str(home)}) as nodes:
        s3 = client("s3", server)
        s3.create_bucket(Bucket="models")
        for path in TINY.iterdir():
            s3.put_object(Bucket="models", Key=f"tiny/{path.name}", Body=path.read_bytes())
        words = [
            f"input.path={shard}",
            "engine.model=s3://models/tiny",
            "cluster.gpus_per_actor=0",
            "cluster.max_actors=1",
            "unit.rows=12",
        ]
        words += [f"engine.storage.{name}={value}" for name, value in options(server).items()]
        env = os.environ | {"RAY_ADDRESS": nodes.gcs, "RAY_AUTH_MODE": "disabled"}

        def run(*more):
            command = [sys.executable, "jobs/fuse.py", *words, *more]
            return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)

        done = run(f"output.path={tmp_path / 'out'}")
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout.splitlines()[-1])["rows"]["planned"] == 12
        assert done.stderr.index("the model is on 2 nodes") < done.stderr.index("1 of 1 units to fuse")
        content = content_hash(Store(str(TINY)))
        assert json.loads((tmp_path / "out/manifest.json").read_text())["base"]["engine.model"] == content
        assert sorted(path.name for path in (home / FOLDER).iterdir()) == [content, f"{content}.lock"], "one whole copy"
        saved = (tmp_path / "out/_run/config-r001.yaml").read_text()
        assert content in saved, "the saved settings name the content of the model"
        assert options(server)["secret"] not in saved
        # A node that cannot fetch it: an error of one line, before the pool starts.
        (home / FOLDER).rename(home / "moved")
        (home / FOLDER).write_text("in the way")
        failed = run(f"output.path={tmp_path / 'out2'}")
        assert failed.returncode == EXIT_USAGE, failed.stderr[-3000:]
        assert "error: HF_HOME=" in failed.stderr
        assert "units to fuse" not in failed.stderr
