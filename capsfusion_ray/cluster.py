"""The Ray cluster at hand: connect or start, and settle the actor pool for what it has."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import services

from capsfusion_ray.config import ClusterConfig, EngineConfig
from capsfusion_ray.errors import ClusterError, ConfigError
from capsfusion_ray.pipeline import READ_CPUS, Pool

log = logging.getLogger(__name__)
START_PATIENCE_S = 300


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
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # since 2.59 Ray may turn token auth on by itself
    os.environ.setdefault("RAY_worker_register_timeout_seconds", str(START_PATIENCE_S))
    impatient = services.get_node

    def patient(*args: Any) -> Any:
        until = time.monotonic() + START_PATIENCE_S
        while True:
            try:
                return impatient(*args)
            except RuntimeError:  # not registered yet
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)

    # ray/_private/node.py gives the raylet a fixed 30 s to appear; it starts five Python processes in that time, and a
    # loaded laptop takes minutes. Its loop asks through this function, so waiting here is waiting there.
    services.get_node = patient
    try:
        ray.init("local", include_dashboard=False, **options)
    except Exception as error:  # Ray raises a bare Exception here, nothing narrower
        raise ClusterError(f"Ray did not start on this machine: {error}") from error
    finally:
        services.get_node = impatient


def disconnect() -> None:
    sys.stderr.flush()
    ray.shutdown()


def settle_pool(cluster: ClusterConfig, engine: EngineConfig, resources: Resources, units: int) -> Pool:
    """How many actors, and what each asks for. Raises ConfigError for a pool that this cluster cannot hold."""
    gpus = cluster.gpus_per_actor
    if gpus is None:
        gpus = 0.0 if engine.device == "cpu" or engine.kind == "echo" or not resources.gpus else 1.0
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
