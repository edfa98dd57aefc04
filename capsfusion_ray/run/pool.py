"""How many actors a run has, and what each of them may take. Pure but for the number of cores: knows no Ray."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from capsfusion_ray.config import ClusterConfig, EngineConfig
from capsfusion_ray.errors import ConfigError

# The CPUs of one reading task. They are asked for beside those of the actors, so that idle actors cannot starve the reads.
READ_CPUS = 0.25


@dataclass(frozen=True)
class Resources:
    """What the cluster, or this machine, has in all when the run starts."""

    cpus: float
    gpus: float
    here: bool  # this machine alone, for this run alone


@dataclass(frozen=True)
class Pool:
    """The actor pool, resolved for the resources at hand."""

    min_actors: int
    max_actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    units_in_flight: int  # per actor


def resolve_pool(cluster: ClusterConfig, engine: EngineConfig, resources: Resources, units: int) -> Pool:
    """The pool for a run of `units` units. Raises ConfigError for a pool that these resources cannot hold."""
    gpus = _gpus_per_actor(cluster, engine, resources)
    fits = int(resources.gpus / gpus) if gpus else int(max(resources.cpus - 1, 1) / cluster.cpus_per_actor)
    wanted = cluster.max_actors or max(fits, cluster.min_actors)
    wanted = max(min(wanted, units), 1)  # an actor beyond the number of units would load its model for nothing
    cpus = cluster.cpus_per_actor
    # Some CPU is left for the reads: on a node with one CPU an idle actor could hold all of it and starve them.
    spare = resources.cpus - 4 * READ_CPUS
    if resources.here and wanted * cpus > spare:
        cpus = max(spare / wanted, 0.01)
    return Pool(min(cluster.min_actors, wanted), wanted, round(cpus, 3), gpus, cluster.units_in_flight)


def _gpus_per_actor(cluster: ClusterConfig, engine: EngineConfig, resources: Resources) -> float:
    gpus, split = cluster.gpus_per_actor, engine.vllm.tensor_parallel
    if gpus is None:
        gpus = 0.0 if engine.device == "cpu" or not engine.loads_model or not resources.gpus else float(split)
    if gpus > 1 and engine.kind != "vllm":
        raise ConfigError(
            f"cluster.gpus_per_actor={gpus:g}: engine.kind={engine.kind} uses one GPU per actor; give at most 1, or engine.kind=vllm "
            "engine.vllm.tensor_parallel=… for a model that does not fit one GPU"
        )
    if max(gpus, 1) != split and gpus:
        raise ConfigError(
            f"cluster.gpus_per_actor={gpus:g} with engine.vllm.tensor_parallel={split}: give the same number"
        )
    if gpus and resources.here and resources.gpus < gpus * cluster.min_actors:
        raise ConfigError(
            f"cluster.gpus_per_actor={gpus:g} with cluster.min_actors={cluster.min_actors}: this machine has {resources.gpus:g} "
            "GPUs; give cluster.gpus_per_actor=0 to run on the CPU"
        )
    return gpus


def resolve_engine(engine: EngineConfig, pool: Pool, resources: Resources) -> EngineConfig:
    """Fill in what depends on the machine: device and dtype by the GPU, and CPU threads by an actor's share of the cores."""
    device = engine.device if engine.device != "auto" else ("cuda" if pool.gpus_per_actor else "cpu")
    dtype = engine.dtype if engine.dtype != "auto" else ("bfloat16" if device == "cuda" else "float32")
    threads = engine.threads
    if threads is None and resources.here and device == "cpu":
        threads = max((os.cpu_count() or 1) // pool.max_actors, 1)
    return dataclasses.replace(engine, device=device, dtype=dtype, threads=threads)
