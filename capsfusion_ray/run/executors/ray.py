"""Runs the stages on a Ray cluster: the graph of pipeline.py, compactions as Ray tasks, the model on every node."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from capsfusion_ray.config import ClusterConfig, EngineConfig
from capsfusion_ray.core.accounting import UnitSummary
from capsfusion_ray.dataset.manifest import GroupEntry
from capsfusion_ray.models.cache import folder_of
from capsfusion_ray.models.location import locate, store_of
from capsfusion_ray.run import cluster as ray_cluster
from capsfusion_ray.run.executors.base import CommitMonitor, GroupTask
from capsfusion_ray.run.pipeline import run_graph
from capsfusion_ray.run.pool import Pool, resolve_engine, resolve_pool
from capsfusion_ray.run.private_cluster import this_machine
from capsfusion_ray.run.prometheus import RunMonitor
from capsfusion_ray.run.ray_data import as_raised
from capsfusion_ray.run.stages import Job, UnitReads

log = logging.getLogger(__name__)
T = TypeVar("T")
COMPACT_CPUS = 0.2


class RayExecutor:
    """Joins the cluster of cluster.address or RAY_ADDRESS, or starts one on this machine for this run alone."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self._cluster = cluster
        self._resources = ray_cluster.connect(cluster)
        self._compactions: dict[Future[GroupEntry], ray.ObjectRef] = {}

    def resolve_pool(self, engine: EngineConfig, units: int) -> Pool:
        return resolve_pool(self._cluster, engine, self._resources, units)

    def resolve_engine(self, engine: EngineConfig, pool: Pool) -> EngineConfig:
        """The model is fetched on every node that may hold an actor now; on one that joins later, by its first actor."""
        if engine.loads_model:
            if not self._resources.here:
                _spread_model(engine, pool)
            elif store_of(engine) is None or "://" in engine.model:  # it is fetched, not read where it is
                folder_of(engine)
        return resolve_engine(engine, pool, self._resources)

    def fuse(self, job: Job, pool: Pool, reads: Sequence[UnitReads]) -> Iterator[UnitSummary]:
        return run_graph(job, pool, reads)

    def compact(self, task: GroupTask) -> Future[GroupEntry]:
        remote = _compact.remote(task)
        answered: Future[Any] = remote.future()
        self._compactions[answered] = remote
        entry: Future[GroupEntry] = Future()
        answered.add_done_callback(lambda done: _copy_answer(done, entry))
        return entry

    def run_as_actor(self, pool: Pool, call: Callable[..., T], *args: Any) -> T:
        task = ray.remote(call).options(num_cpus=pool.cpus_per_actor, num_gpus=pool.gpus_per_actor, max_retries=0)
        result: T = ray.get(task.remote(*args))
        return result

    def monitor(self, planned_rows: int, committed_rows: int, actors: int) -> AbstractContextManager[CommitMonitor]:
        return RunMonitor(planned_rows, committed_rows, actors)

    def close(self) -> None:
        for answered, remote in self._compactions.items():
            if not answered.done():
                with suppress(ray.exceptions.RayError):  # the cluster may be gone
                    ray.cancel(remote)
        ray_cluster.disconnect()

    @staticmethod
    def expected_pool(cluster: ClusterConfig, engine: EngineConfig) -> tuple[float, int]:
        """What a run on this machine would take, where no cluster is named and it has the GPUs; else what is asked for.

        A named cluster is not asked: one that scales up has few GPUs or none until a run wants them. The quote is then
        that of a CPU, and the log says so.
        """
        named = ray_cluster.named_cluster(cluster)
        if not named:
            here = this_machine()
            wanted = (cluster.gpus_per_actor or 0.0) * cluster.min_actors or float(engine.device == "cuda")
            if here.gpus >= wanted:  # otherwise the plan is made here for a cluster
                pool = resolve_pool(cluster, engine, here, units=sys.maxsize)
                return pool.gpus_per_actor, pool.max_actors
        if cluster.gpus_per_actor is not None:
            return cluster.gpus_per_actor, cluster.max_actors or cluster.min_actors
        if named and engine.loads_model and engine.device == "auto":
            log.warning(
                "%s: its GPUs are not looked up; this quote is for CPUs, and cluster.gpus_per_actor=1 gives one for GPUs",
                named,
            )
        gpus = float(engine.vllm.tensor_parallel) if engine.device == "cuda" else 0.0
        return gpus, cluster.max_actors or cluster.min_actors


@ray.remote(num_cpus=COMPACT_CPUS)
def _compact(task: GroupTask) -> GroupEntry:
    return task()


def _copy_answer(answered: Future[GroupEntry], entry: Future[GroupEntry]) -> None:
    """Pass the answer of a Ray task on, with an error of ours as itself."""
    try:
        with as_raised():
            entry.set_result(answered.result())
    except BaseException as error:
        entry.set_exception(error)


def _spread_model(engine: EngineConfig, pool: Pool) -> None:
    """Fetch the model on every node that can hold an actor, before the pool starts.

    Raises what `folder_of` raises on any of them, such as for a folder that is not the same on all nodes.
    """
    fit = [node["NodeID"] for node in ray.nodes() if node["Alive"] and _can_hold_actor(node["Resources"], pool)]
    log.info("looking for %s on %d nodes", locate(engine.model), len(fit))
    began = time.monotonic()
    # num_cpus=0: fetching needs hardly any CPU, and a node whose CPUs are all taken must not delay the others.
    task = ray.remote(folder_of)
    there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in fit]
    asked = [task.options(num_cpus=0, max_retries=3, scheduling_strategy=node).remote(engine) for node in there]
    gone = 0
    with as_raised():
        for answer in asked:
            try:
                ray.get(answer)
            except RayTaskError:
                raise
            except ray.exceptions.RayError:  # the node left meanwhile; its actors would look for the model themselves
                gone += 1
    log.info("the model is on %d nodes, after %.0f s", len(fit) - gone, time.monotonic() - began)


def _can_hold_actor(resources: dict[str, float], pool: Pool) -> bool:
    return resources.get("CPU", 0.0) >= pool.cpus_per_actor and resources.get("GPU", 0.0) >= pool.gpus_per_actor
