"""A run loses nodes, for a while all of them, or an actor runs out of memory: it ends with the files of an undisturbed run."""

import time
from contextlib import contextmanager, suppress

import psutil
import pytest
from cgroup import put_into, tight_cgroup
from drivers import Driver, resumable
from outputs import snapshot
from ray_nodes import lose, ray_nodes

from capsfusion_ray.storage import Store

FUSION_ACTOR = "ray::MapWorker(MapBatches(FusionActor))"  # as Ray names its process
NODE_CPUS = 2
GAP_S = 45.0  # without any node; Ray gives a silent node up after 15 s
SETTINGS = [
    "engine.dtype=float32",
    "engine.threads=1",
    "cluster.gpus_per_actor=0",
    "source.passthrough=[width]",
    "unit.rows=5",
]
UNITS = 80
ONE_PER_NODE = "cluster.cpus_per_actor=1.2"  # a node has 2 CPUs: for one actor, and for reads and commits
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture
def cluster():
    """A head without CPUs: all tasks and actors run on the nodes that join it."""
    with ray_nodes(env={}) as nodes:
        yield nodes


@pytest.fixture
def calm(corpus, tmp_path, driver):
    """The files of an undisturbed run over the corpus."""
    output = tmp_path / "undisturbed"
    driver.run("fuse", f"input.path={corpus}", f"output.path={output}", *SETTINGS, "cluster.max_actors=1")
    return snapshot(output)


@contextmanager
def node(cluster):
    """A node that joins, and that is killed at the end if it still runs."""
    raylet = cluster.join(NODE_CPUS)
    yield raylet
    if raylet.is_running():
        lose(raylet)


def actors(raylet):
    """The fusion actors on the node of `raylet`."""
    found = []
    for process in raylet.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith(FUSION_ACTOR):
                found.append(process)
    return found


class Run:
    """A fuse job that runs while its nodes are lost."""

    def __init__(self, cluster, corpus, output, actors):
        self.driver, self.store = Driver(cluster.gcs), Store(str(output))
        pool = [f"cluster.min_actors={actors}", f"cluster.max_actors={actors}", ONE_PER_NODE]
        self.process = self.driver.start("fuse", f"input.path={corpus}", f"output.path={output}", *SETTINGS, *pool)

    @property
    def units(self):
        return resumable(self.store)

    def wait_for(self, seen):
        while not seen():
            self.must_run()
            time.sleep(0.05)

    def must_run(self):
        assert self.process.poll() is None, self.process.communicate()[1][-5000:]

    def end(self):
        """Wait for the job, which must end well, and verify its output."""
        said = self.process.communicate(timeout=900)[1]
        assert self.process.returncode == 0, said[-5000:]
        self.driver.run("verify", f"output.path={self.store.root}", "deep=true")


def test_one_of_two_nodes_is_killed_then_the_other_and_for_a_while_there_is_none(cluster, corpus, calm, tmp_path):
    """SIGKILL to all processes of one node, later to those of the other; no node for GAP_S; then two nodes join and finish the run."""
    output = tmp_path / "out"
    with node(cluster) as first, node(cluster) as second:
        run = Run(cluster, corpus, output, actors=2)
        run.wait_for(lambda: run.units and actors(first) and actors(second))
        lose(first)
        one_left = run.units
        run.wait_for(lambda: run.units > one_left + 4)
        lose(second)
    none_left = run.units
    assert none_left < UNITS, "the run was over before its nodes were"
    time.sleep(GAP_S)
    run.must_run()
    assert run.units == none_left
    with node(cluster), node(cluster):
        run.end()
    print(f"of {UNITS} units {one_left} were fused when the first node was lost, {none_left} when the second was")
    assert snapshot(output) == calm


def test_an_actor_without_memory_is_killed_by_the_kernel_and_its_units_are_fused(cluster, corpus, calm, tmp_path):
    cgroup = tight_cgroup()
    if cgroup is None:
        pytest.skip("no cgroup of its own here")
    output = tmp_path / "out"
    try:
        with node(cluster) as only:
            run = Run(cluster, corpus, output, actors=1)
            run.wait_for(lambda: run.units and actors(only))
            (actor,) = actors(only)
            put_into(cgroup, actor.pid)
            gone, _ = psutil.wait_procs([actor], timeout=120)
            assert gone, "the actor needed no more memory"
            assert run.units < UNITS, "the run was over before its actor was"
            run.end()
    finally:
        cgroup.rmdir()
    assert snapshot(output) == calm
