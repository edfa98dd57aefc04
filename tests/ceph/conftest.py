"""A Ceph of one node for all these tests, a bucket for each, and a Ray cluster for the jobs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from ceph_node import ceph_node
from drivers import Driver, ray_head
from moto_server import new_bucket, options
from proxy import FaultProxy

from capsfusion_ray.storage import Store


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its URL."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    folder = tmp_path_factory.mktemp("ceph")
    try:
        with ceph_node(folder) as url:
            yield url
    finally:
        # pytest keeps its last temporary folders, and this one holds gigabytes.
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def proxy(ceph: str) -> Iterator[FaultProxy]:
    """Before it, to count requests; it injects nothing."""
    with FaultProxy(ceph) as proxy:
        yield proxy


@pytest.fixture
def bucket(ceph: str) -> str:
    return new_bucket(ceph)


@pytest.fixture
def store(proxy: FaultProxy, bucket: str) -> Store:
    return Store(f"s3://{bucket}/some/root", options(proxy.url))


@pytest.fixture(scope="session")
def driver(ceph: str) -> Iterator[Driver]:
    """Against a cluster whose environment, as the drivers', has no credentials: those of the command line alone count."""
    with ray_head() as address:
        yield Driver(address)
