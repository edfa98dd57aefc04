"""What the faults of chaos hit: a Ray cluster of three nodes, an S3 server behind a proxy, and jobs as processes.

The servers listen on 127.0.0.1; Ray listens where it does by default, because a driver that is given 127.0.0.1 looks for
the address of this machine. All files are in one folder, and processes are ended by pid. Knows no kinds of faults.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from ports import free_port
from proxy import FaultProxy
from ray.cluster_utils import Cluster
from ray_nodes import lose, raylet_of

from capsfusion_ray.run.private_cluster import patient_start

ROOT = Path(__file__).resolve().parents[2]
MARK = "CAPSFUSION_CHAOS"  # in the environment of every process that is started here, so that those left behind can be found
WORKERS = 2
# Logical CPUs: enough for both actors of a run, its reads, commits and compactions, after the other node was lost.
NODE = {"num_cpus": 2, "object_store_memory": 100 << 20}


def mark() -> str:
    """Prepare the environment of this process, which all others inherit; the mark in it."""
    os.environ[MARK] = uuid.uuid4().hex
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}
    for name in [name for name in os.environ if name.startswith("AWS_") or name == "RAY_ADDRESS"]:
        del os.environ[name]
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    return os.environ[MARK]


def end_all(marked: str) -> int:
    """SIGKILL, by pid, each process with this mark that still runs; how many there were."""
    left = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == marked:
                left.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=20)
    return len(left)


class Nodes:
    """A head without CPUs, which drivers join, and WORKERS raylets that stand for other machines."""

    def __init__(self, folder: Path) -> None:
        os.environ["RAY_TMPDIR"] = str(
            folder
        )  # otherwise `ray.init()` elsewhere on this machine would find this cluster
        folder.mkdir()

    def __enter__(self) -> Nodes:
        # Ray's default ports may belong to another cluster; 0 lets patient_start find a port for the agent.
        head = {
            "num_cpus": 0,
            "include_dashboard": False,
            "dashboard_agent_listen_port": 0,
            "dashboard_port": free_port(),
        }
        with patient_start():
            self._cluster = Cluster(initialize_head=True, head_node_args=NODE | head)
        self.address: str = self._cluster.address
        self.replenish()
        # The thread of a fault adds later nodes, and Ray cannot set its SIGTERM handler there; they end with the head.
        self._cluster._shutdown_at_exit = False
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()

    def replenish(self) -> int:
        """Add a node for each lost one; how many."""
        missing = WORKERS - len(self._cluster.worker_nodes)
        for _ in range(missing):
            with patient_start():
                self._cluster.add_node(wait=False, **NODE)
        return missing

    def kill(self, pid: int) -> str:
        """SIGKILL the raylet that started process `pid` and all its processes; what was killed, empty where it is no node of ours."""
        for node in self._cluster.worker_nodes:
            raylet = raylet_of(node)
            if pid in [child.pid for child in raylet.children(recursive=True)]:
                killed = lose(raylet)
                self._cluster.remove_node(node, allow_graceful=False)
                return f"raylet {raylet.pid} and its {len(killed) - 1} processes"
        return ""


class WatchedProxy(FaultProxy):
    """A FaultProxy that shows a watcher each request, before the server gets it and after it was carried out.

    `watch(request, after)` runs in the loop of the proxy. It returns None, or a call that runs while the request is held:
    the call gets the pid of the client, and returns whether the request must be dropped.
    """

    watch: Callable[[Any, bool], Callable[[int], bool] | None] = staticmethod(lambda request, after: None)

    async def _answer(self, request: Any, writer: asyncio.StreamWriter) -> bool:
        request.port = writer.get_extra_info("peername")[1]
        return await super()._answer(request, writer)

    async def _forward(self, request: Any) -> Any:
        await self._tell(request, False)
        answer = await super()._forward(request)
        await self._tell(request, True)
        return answer

    async def _tell(self, request: Any, after: bool) -> None:
        act = self.watch(request, after)
        if act is None:
            return
        drop = await asyncio.get_running_loop().run_in_executor(None, lambda: act(_who_asks(request.port)))
        if drop:
            raise ConnectionResetError("the client was killed")


def _who_asks(port: int) -> int:
    """The pid of the client whose connection to the proxy has this port; 0 where it has ended."""
    return next((c.pid for c in psutil.net_connections("tcp4") if c.laddr and c.laddr.port == port and c.pid), 0)


class Jobs:
    """Starts `python jobs/<job>.py …` as processes, each with a log of its own."""

    def __init__(self, address: str) -> None:
        self._env = os.environ | {"RAY_ADDRESS": address, "LOG_LEVEL": "INFO"}
        self._running: list[Job] = []
        self.folder = Path()
        self._count = 0

    def start(self, job: str, *args: str) -> Job:
        self._count += 1
        started = Job(self.folder / f"{self._count:03d}-{job}", job, args, self._env)
        self._running = [other for other in self._running if other.poll() is None] + [started]
        return started

    def end(self) -> None:
        for job in self._running:
            job.kill()


class Job:
    """One process of a job."""

    def __init__(self, log: Path, job: str, args: tuple[str, ...], env: dict[str, str]) -> None:
        self.name, self._began = job, time.monotonic()
        self._out, self._err = log.with_suffix(".out"), log.with_suffix(".err")
        command = [sys.executable, f"jobs/{job}.py", *args]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        if self.poll() is None:
            self.signal(signal.SIGKILL)
            self._process.wait()

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._began

    @property
    def said(self) -> str:
        return self._err.read_text(errors="replace")

    @property
    def last_words(self) -> str:
        lines = [line for line in self.said.splitlines() if line.strip()]
        return lines[-1][:200] if lines else "(nothing)"

    @property
    def result(self) -> str:
        return (self._out.read_text().splitlines() or [""])[-1]
