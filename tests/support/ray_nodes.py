"""A Ray cluster on this machine as Kubernetes has one: a head without CPUs, workers, and a dashboard that takes jobs.

    python tests/support/ray_nodes.py <CPUs of each worker …>

Each node is a raylet of its own. The script prints one JSON line once all nodes are up. For every number that it then
reads it adds a node and prints the pid of its raylet. It ends when its standard input is closed, so nothing outlives a
killed test; and it is a process of its own, so that its environment is that of the cluster.
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
    """Where to reach the nodes."""

    gcs: str  # RAY_ADDRESS of a driver
    dashboard: str  # RAY_ADDRESS of `ray job submit`
    session: Path  # Ray's folder of logs, and of the file that tells Prometheus what to scrape
    _process: subprocess.Popen[str]

    def join(self, cpus: int) -> psutil.Process:
        """Add a node; its raylet, whose children are all processes of the node."""
        assert self._process.stdin
        self._process.stdin.write(f"{cpus}\n")
        self._process.stdin.flush()
        return psutil.Process(_next_line(self._process)["raylet"])


def raylet_of(node: Any) -> psutil.Process:
    """The raylet of a node of ray.cluster_utils."""
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def lose(raylet: psutil.Process) -> Sequence[psutil.Process]:
    """SIGKILL the raylet of a node and all that it started, as if its power failed; which processes these were."""
    processes = [raylet, *raylet.children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return processes


@contextmanager
def ray_nodes(*worker_cpus: int, env: Mapping[str, str]) -> Iterator[Nodes]:
    """Start the nodes. All daemons, workers and submitted drivers get the environment of this process, and `env`."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # a job's entrypoint is `python …`
    command = [sys.executable, __file__, *map(str, worker_cpus)]
    # A submitted job joins the cluster that last wrote its address into Ray's folder, so each cluster has a folder of its
    # own; its name is short because sockets need a short path.
    with TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        all_env = {**os.environ, "PATH": path, "RAY_TMPDIR": folder, **env}
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=all_env
        ) as process:
            told = _next_line(process)
            yield Nodes(told["gcs"], told["dashboard"], Path(told["session"]), process)
            # Leaving Popen's context closes the pipes, and waits.


def _next_line(process: subprocess.Popen[str]) -> Any:
    """The next JSON line; lines that Ray prints are skipped."""
    assert process.stdout
    return next(json.loads(line) for line in process.stdout if line.startswith("{"))


def serve(worker_cpus: list[int]) -> None:
    from ray.cluster_utils import Cluster

    head = {
        "num_cpus": 0,
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": free_port(),  # Ray's default, 8265 or the next ones, may belong to another cluster
        "dashboard_agent_listen_port": 0,  # patient_start finds one; Ray's default 52365 may belong to another cluster
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
    """Wait for the agent of the head: it starts the submitted drivers, and comes up later than the head."""
    until = time.monotonic() + START_PATIENCE_S
    while time.monotonic() < until:
        with socket.socket() as s:
            if s.connect_ex((head.node_ip_address, head.dashboard_agent_listen_port)) == 0:
                return
        time.sleep(0.1)
    raise SystemExit("the agent of the head node does not answer")


if __name__ == "__main__":
    serve([int(cpus) for cpus in sys.argv[1:]])
