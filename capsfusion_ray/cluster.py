"""The Ray cluster at hand: connect or start, and settle the actor pool for what it has."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import random
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import services
from ray._raylet import DASHBOARD_AGENT_LISTEN_PORT_NAME, persist_port  # type: ignore[attr-defined]  # compiled

from capsfusion_ray.config import ClusterConfig, EngineConfig
from capsfusion_ray.errors import ClusterError, ConfigError
from capsfusion_ray.pipeline import READ_CPUS, Pool

log = logging.getLogger(__name__)
START_PATIENCE_S = 300
AGENT_PORT_RANGE = range(20_000, 32_000)
AGENT_PORTS = ("metrics_agent_port", "runtime_env_agent_port", "dashboard_agent_listen_port", "metrics_export_port")


@dataclass(frozen=True)
class Resources:
    """What the cluster has in all, when the run starts."""

    cpus: float
    gpus: float
    here: bool  # started by this process, on this machine alone


def connect(cluster: ClusterConfig) -> Resources:
    """Join the cluster named by cluster.address or RAY_ADDRESS (as `ray job submit` sets it), else start one here."""
    address = None if cluster.address == "auto" else cluster.address
    here = address is None and "RAY_ADDRESS" not in os.environ
    common: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True}
    if here:
        # One logical CPU beside the cores: reads and commits wait on the store, and actors may hold every core.
        start_here(num_cpus=(os.cpu_count() or 1) + 1, **common)
    else:
        ray.init(address, **common)
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.WARNING)
    total = ray.cluster_resources()
    return Resources(total.get("CPU", 1.0), total.get("GPU", 0.0), here)


def start_here(**options: Any) -> None:
    """Start Ray on this machine alone; `options` are ray.init's. Raises ClusterError where it does not come up."""
    with patient_start():
        try:
            ray.init("local", include_dashboard=False, **options)
        except Exception as error:  # Ray raises a bare Exception here, nothing narrower
            raise ClusterError(f"Ray did not start on this machine: {error}") from error


@contextmanager
def patient_start() -> Iterator[None]:
    """While Ray's processes are started on this machine: minutes to come up, and a fair share of its CPU for workers."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # since 2.59 Ray may turn token auth on by itself
    os.environ.setdefault("RAY_worker_register_timeout_seconds", str(START_PATIENCE_S))
    # Ray's own is 15: then its dozen idle daemons, at 0, take a starved machine's CPU from the one process that fuses.
    os.environ.setdefault("RAY_worker_niceness", "0")
    get_node, start_raylet = services.get_node, services.start_raylet

    def patient(*args: Any) -> Any:
        until = time.monotonic() + START_PATIENCE_S
        while True:
            try:
                return get_node(*args)
            except RuntimeError:  # not registered yet
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)

    def with_ports(*args: Any, **kwargs: Any) -> Any:
        free = _free_ports()
        kwargs |= {name: kwargs.get(name) or next(free) for name in AGENT_PORTS}
        asked = inspect.signature(start_raylet).bind(*args, **kwargs).arguments
        # This one port the raylet wants to read from the agent's file even where it is known.
        name, port = DASHBOARD_AGENT_LISTEN_PORT_NAME, kwargs["dashboard_agent_listen_port"]
        persist_port(asked["session_dir"], asked["node_id"], name, port)
        return start_raylet(*args, **kwargs)

    # Ray 2.60 gives its raylet 15 s to hear from two Python agents, unless their ports are told to it, and 30 s to appear
    # (ray/_private/node.py); neither can be set through ray.init, and a loaded laptop needs minutes. Both steps go through
    # these two functions, so the ports are told here, and waiting here is waiting there.
    services.get_node, services.start_raylet = patient, with_ports
    try:
        yield
    finally:
        services.get_node, services.start_raylet = get_node, start_raylet


def _free_ports() -> Iterator[int]:
    """Ports that nobody listens on, below those that the kernel gives to outgoing connections.

    An agent binds its port up to a minute after it was told: a port of the kernel's own choice may be taken by then.
    """
    for port in random.sample(AGENT_PORT_RANGE, len(AGENT_PORT_RANGE)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        yield port


def disconnect() -> None:
    sys.stderr.flush()
    ray.shutdown()


def settle_pool(cluster: ClusterConfig, engine: EngineConfig, resources: Resources, units: int) -> Pool:
    """How many actors, and what each asks for. Raises ConfigError for a pool that this cluster cannot hold."""
    gpus = cluster.gpus_per_actor
    if gpus is None:
        gpus = 0.0 if engine.device == "cpu" or not engine.loads_model or not resources.gpus else 1.0
    if gpus and resources.here and resources.gpus < gpus * cluster.min_actors:
        raise ConfigError(
            f"cluster.gpus_per_actor={gpus} with cluster.min_actors={cluster.min_actors}: this machine has {resources.gpus:g} "
            "GPUs; give cluster.gpus_per_actor=0 to run on the CPU"
        )
    fits = int(resources.gpus / gpus) if gpus else int(max(resources.cpus - 1, 1) / cluster.cpus_per_actor)
    wanted = cluster.max_actors or max(fits, cluster.min_actors)
    wanted = max(min(wanted, units), 1)  # more actors than units would load models for nothing
    cpus = cluster.cpus_per_actor
    # Leave room to read: with one CPU a node, an idle actor could hold the only one and starve the reads.
    spare = resources.cpus - 4 * READ_CPUS
    if resources.here and wanted * cpus > spare:
        cpus = max(spare / wanted, 0.01)
    return Pool(min(cluster.min_actors, wanted), wanted, round(cpus, 3), gpus, cluster.units_in_flight)


def settle_engine(engine: EngineConfig, pool: Pool, resources: Resources) -> EngineConfig:
    """Fill in what depends on the machine: dtype and device by GPU, CPU threads by the actor's share of the cores."""
    device = engine.device if engine.device != "auto" else ("cuda" if pool.gpus_per_actor else "cpu")
    dtype = engine.dtype if engine.dtype != "auto" else ("bfloat16" if device == "cuda" else "float32")
    threads = engine.threads
    if threads is None and resources.here and device == "cpu":
        threads = max((os.cpu_count() or 1) // pool.max_actors, 1)
    return dataclasses.replace(engine, device=device, dtype=dtype, threads=threads)
