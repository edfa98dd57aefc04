"""The executor protocol and the one table of executors. The driver, the retry and the repair talk to this alone.

Imports no executor until it is chosen, so that a local run imports no Ray.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from capsfusion_ray.config import ClusterConfig, EngineConfig, OutputConfig
from capsfusion_ray.core.accounting import UnitSummary
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.dataset.compaction import compact_group
from capsfusion_ray.dataset.manifest import GroupEntry
from capsfusion_ray.run.pool import Pool
from capsfusion_ray.run.stages import Job, UnitReads
from capsfusion_ray.storage import Store, patiently

T = TypeVar("T")
EXECUTORS = {
    "ray": "capsfusion_ray.run.executors.ray:RayExecutor",
    "local": "capsfusion_ray.run.executors.local:LocalExecutor",
}


@dataclass(frozen=True)
class GroupTask:
    """The compaction of one group of input shards, all of whose units are committed."""

    store: Store
    group: str
    plan: int  # the number of the plan
    units: tuple[WorkUnit, ...]
    fields: tuple[tuple[str, str], ...]
    output: OutputConfig

    def __call__(self) -> GroupEntry:
        return patiently(lambda: compact_group(self.store, self.group, self.plan, self.units, self.fields, self.output))


class CommitMonitor(Protocol):
    """Is told of every commit of a run."""

    def committed(self, unit: UnitSummary, committed_rows: int) -> None: ...


class Executor(Protocol):
    """Runs the stages. Made by `open_executor`, which joins or starts what it needs; `close` ends that."""

    def resolve_pool(self, engine: EngineConfig, units: int) -> Pool:
        """The pool for `units` units on the resources at hand. Raises ConfigError for one that they cannot hold."""

    def resolve_engine(self, engine: EngineConfig, pool: Pool) -> EngineConfig:
        """Fill in what depends on the machine, and fetch the model wherever an actor may start.

        Raises what models.cache.folder_of raises.
        """

    def fuse(self, job: Job, pool: Pool, reads: Sequence[UnitReads]) -> Iterator[UnitSummary]:
        """Run every unit of `reads` through all stages; the summaries in the order of commit.

        Raises what a stage raised. What is under way ends with `close`.
        """

    def compact(self, task: GroupTask) -> Future[GroupEntry]:
        """Start the compaction of a group beside the other work; the future has its entry, or what it raised."""

    def run_as_actor(self, pool: Pool, call: Callable[..., T], *args: Any) -> T:
        """The result of `call(*args)`, run with the share of the resources that one actor gets."""

    def monitor(self, planned_rows: int, committed_rows: int, actors: int) -> AbstractContextManager[CommitMonitor]:
        """Where the commits of a run are to be reported to, while the context is open."""

    def close(self) -> None:
        """End all work and leave the cluster, or end it where it was started for this run."""

    @staticmethod
    def expected_pool(cluster: ClusterConfig, engine: EngineConfig) -> tuple[float, int]:
        """GPUs per actor, and actors, that a run would take, for a quote: nothing is started or joined to find out."""


def executor_class(cluster: ClusterConfig) -> type[Executor]:
    """The class of `cluster.kind`, which was validated when the config was parsed."""
    module, _, name = EXECUTORS[cluster.kind].partition(":")
    found: type[Executor] = getattr(importlib.import_module(module), name)
    return found


def open_executor(cluster: ClusterConfig) -> Executor:
    """The executor of `cluster.kind`, ready for work. Raises ConfigError or ClusterError where it cannot be had."""
    build: Callable[[ClusterConfig], Executor] = executor_class(cluster)
    return build(cluster)
