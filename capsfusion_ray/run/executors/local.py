"""Runs the stages in this one process, with threads and without Ray: for tests, and for a notebook's hundred rows.

One engine, one thread that reads ahead, and cluster.units_in_flight threads: each takes a unit, has it fused, judges it
and commits it. The output has the same files, names and bytes as under Ray.

What one process cannot do: a row that kills its process kills the run (under Ray the row is found and rejected), and an
engine that dies or stalls ends the run with an error (under Ray another actor takes over). What is committed is kept in
either case, and the same command resumes.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

from capsfusion_ray.config import ClusterConfig, EngineConfig
from capsfusion_ray.core.accounting import UnitSummary
from capsfusion_ray.core.unit_batch import UnitBatch, unit_in_traceback
from capsfusion_ray.dataset.manifest import GroupEntry
from capsfusion_ray.engines.base import count_gpus
from capsfusion_ray.errors import ConfigError, EngineError
from capsfusion_ray.models.cache import folder_of
from capsfusion_ray.models.location import store_of
from capsfusion_ray.run.engine_loop import BuildEngine, EngineLoop
from capsfusion_ray.run.executors.base import CommitMonitor, GroupTask
from capsfusion_ray.run.pool import Pool, Resources, resolve_engine, resolve_pool
from capsfusion_ray.run.stages import Job, UnitReads, judge_and_commit, within_cap
from capsfusion_ray.run.unit_fuser import UnitFuser, start_fuser

T = TypeVar("T")
LOOK_EVERY_S = 0.2  # how often a waiting thread looks whether the run ends
STOP_S = 30.0  # the longest wait for a thread at the end of a run


class LocalExecutor:
    """One engine in this process. `build` constructs it; None: the one of engine.kind (tests give engines that fail)."""

    def __init__(self, cluster: ClusterConfig, build: BuildEngine | None = None) -> None:
        self._cluster, self._build = _one_actor(cluster), build
        self._compactions = ThreadPoolExecutor(1, thread_name_prefix="compaction")
        self._threads: _Threads | None = None  # of the run under way

    def resolve_pool(self, engine: EngineConfig, units: int) -> Pool:
        return resolve_pool(self._cluster, engine, _this_machine(engine), units)

    def resolve_engine(self, engine: EngineConfig, pool: Pool) -> EngineConfig:
        if engine.loads_model and (store_of(engine) is None or "://" in engine.model):
            folder_of(engine)
        return resolve_engine(engine, pool, _this_machine(engine))

    def fuse(self, job: Job, pool: Pool, reads: Sequence[UnitReads]) -> Iterator[UnitSummary]:
        fuser, loop = start_fuser(job.engine, job.decode, job.template, self._build)
        self._threads = _Threads(job, fuser, loop, reads, pool.units_in_flight)
        yield from within_cap(self._threads.summaries(), job.engine.api, pool.max_actors)
        self._stop()

    def compact(self, task: GroupTask) -> Future[GroupEntry]:
        return self._compactions.submit(task)

    def run_as_actor(self, pool: Pool, call: Callable[..., T], *args: Any) -> T:
        return call(*args)

    def monitor(self, planned_rows: int, committed_rows: int, actors: int) -> AbstractContextManager[CommitMonitor]:
        return nullcontext(_NoMonitor())

    def close(self) -> None:
        self._stop()
        self._compactions.shutdown(cancel_futures=True)

    def _stop(self) -> None:
        if self._threads:
            self._threads.stop()
        self._threads = None

    @staticmethod
    def expected_pool(cluster: ClusterConfig, engine: EngineConfig) -> tuple[float, int]:
        pool = resolve_pool(_one_actor(cluster), engine, _this_machine(engine), units=1)
        return pool.gpus_per_actor, pool.max_actors


def _one_actor(cluster: ClusterConfig) -> ClusterConfig:
    """Raises ConfigError where more than one actor is the least."""
    if cluster.min_actors > 1:
        raise ConfigError(
            f"cluster.min_actors={cluster.min_actors} with cluster.kind=local: one process holds one engine; give "
            "cluster.min_actors=1, or cluster.kind=ray"
        )
    return replace(cluster, max_actors=1)


def _this_machine(engine: EngineConfig) -> Resources:
    return Resources((os.cpu_count() or 1) + 1, count_gpus(engine), here=True)


class _NoMonitor:
    """Prometheus is served by Ray's agents; without Ray nobody asks."""

    def committed(self, unit: UnitSummary, committed_rows: int) -> None: ...


class _Threads:
    """The threads of one run: a reader that reads ahead, and workers that fuse, judge and commit one unit each."""

    def __init__(self, job: Job, fuser: UnitFuser, loop: EngineLoop, reads: Sequence[UnitReads], workers: int) -> None:
        self._job, self._fuser, self._loop, self._reads = job, fuser, loop, reads
        # The reader is one unit ahead of the workers. None: no further unit comes.
        self._read: queue.Queue[UnitBatch | None] = queue.Queue(maxsize=1)
        # A summary, the error of a thread, or None from each worker that has ended.
        self._done: queue.SimpleQueue[UnitSummary | BaseException | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._workers = [threading.Thread(target=self._work, name=f"unit-{i}", daemon=True) for i in range(workers)]
        self._reader = threading.Thread(target=self._read_all, name="reader", daemon=True)
        for thread in (self._reader, *self._workers):
            thread.start()

    def summaries(self) -> Iterator[UnitSummary]:
        """As the units are committed. Raises the first error of any thread, in the caller's."""
        running = len(self._workers)
        while running:
            done = self._done.get()
            if isinstance(done, BaseException):
                raise done
            if done is None:
                running -= 1
            else:
                yield done

    def stop(self) -> None:
        """End all threads: no unit begins, those with the engine are given up, and a commit that has begun is finished."""
        self._stopping.set()
        self._loop.stop(EngineError("the run ends"))
        for thread in (self._reader, *self._workers):
            thread.join(STOP_S)

    def _read_all(self) -> None:
        try:
            for task in self._reads:
                for batch in task.read(self._job):
                    if not self._hand_over(batch):
                        return
        except BaseException as error:
            self._done.put(error)
            self._stopping.set()
        for _ in self._workers:
            self._hand_over(None)

    def _hand_over(self, batch: UnitBatch | None) -> bool:
        """Wait for a free place in the queue; False where the run ends meanwhile."""
        while not self._stopping.is_set():
            try:
                self._read.put(batch, timeout=LOOK_EVERY_S)
                return True
            except queue.Full:
                continue
        return False

    def _next(self) -> UnitBatch | None:
        while not self._stopping.is_set():
            try:
                return self._read.get(timeout=LOOK_EVERY_S)
            except queue.Empty:
                continue
        return None

    def _work(self) -> None:
        try:
            while batch := self._next():
                with unit_in_traceback(batch.unit):
                    fused = self._fuser.fuse(batch)
                if not self._stopping.is_set():
                    self._done.put(judge_and_commit(fused, self._job))
        except BaseException as error:
            self._stopping.set()
            self._done.put(error)
        self._done.put(None)
