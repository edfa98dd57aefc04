"""A Ray cluster on this machine as Kubernetes has one: a head without CPUs, workers, and a dashboard that takes jobs.

    python tests/support/ray_nodes.py <CPUs of each worker …>

Each node is a raylet of its own. It prints one JSON line once all are up, adds a node for every further number that it
reads, whose raylet's pid it prints, and ends with its standard input: a process of its own, so that its environment is the
cluster's, and nothing outlives a killed test.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from ports import free_port

from capsfusion_ray.run.private_cluster import START_PATIENCE_S, patient_start


@dataclass(frozen=True)
class Nodes:
    """Where to reach them."""

    gcs: str  # RAY_ADDRESS of a driver
    dashboard: str  # RAY_ADDRESS of `ray job submit`
    session: Path  # Ray's folder of logs, and of the file that tells Prometheus what to scrape
    _process: subprocess.Popen[str]

    def join(self, cpus: int) -> psutil.Process:
        """The raylet of a node that joins; all that runs on the node are its children."""
        assert self._process.stdin
        self._process.stdin.write(f"{cpus}\n")
        self._process.stdin.flush()
        return psutil.Process(_next_line(self._process)["raylet"])


def raylet_of(node: Any) -> psutil.Process:
    """The raylet of a node of ray.cluster_utils."""
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def lose(raylet: psutil.Process) -> Sequence[psutil.Process]:
    """SIGKILL to a node's raylet and to all that it started, as if its power went. Which they were."""
    processes = [raylet, *raylet.children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return processes


@contextmanager
def ray_nodes(*worker_cpus: int, env: Mapping[str, str]) -> Iterator[Nodes]:
    """`env`, beside this process' own, is the environment of all daemons, workers and submitted drivers."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # a job's entrypoint is `python …`
    command = [sys.executable, __file__, *map(str, worker_cpus)]
    # A submitted job joins the cluster that wrote its address into Ray's folder last: each has a folder, of a short name for sockets.
    with TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        all_env = {**os.environ, "PATH": path, "RAY_TMPDIR": folder, **env}
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=all_env
        ) as process:
            told = _next_line(process)
            yield Nodes(told["gcs"], told["dashboard"], Path(told["session"]), process)
            # Leaving Popen's context closes the pipes, and waits.


def _next_line(process: subprocess.Popen[str]) -> Any:
    """Of what it tells, amid what Ray says."""
    assert process.stdout
    return next(json.loads(line) for line in process.stdout if line.startswith("{"))


def serve(worker_cpus: list[int]) -> None:
    from ray.cluster_utils import Cluster

    head = {
        "num_cpus": 0,
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": free_port(),  # Ray looks from 8265 on, where another cluster's may be
        "dashboard_agent_listen_port": 0,  # patient_start finds one; Ray's own 52365 may be another cluster's
    }
    with patient_start():
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for cpus in worker_cpus:
            cluster.add_node(num_cpus=cpus)
    wait_for_agent(cluster.head_node)
    told = {
        "gcs": cluster.gcs_address,
        "dashboard": f"http://{cluster.webui_url}",
        "session": cluster.head_node.get_session_dir_path(),
    }
    print(json.dumps(told), flush=True)
    for line in sys.stdin:
        with patient_start():
            node = cluster.add_node(num_cpus=int(line))
        print(json.dumps({"raylet": raylet_of(node).pid}), flush=True)
    cluster.shutdown()


def wait_for_agent(head: Any) -> None:
    """The head is up before its agent, which starts the submitted drivers: until then the dashboard takes no job."""
    until = time.monotonic() + START_PATIENCE_S
    while time.monotonic() < until:
        with socket.socket() as s:
            if s.connect_ex((head.node_ip_address, head.dashboard_agent_listen_port)) == 0:
                return
        time.sleep(0.1)
    raise SystemExit("the agent of the head node does not answer")


if __name__ == "__main__":
    serve([int(cpus) for cpus in sys.argv[1:]])
