"""Fixtures of the stores that tests run against. S3 is a moto server.

boto3 and moto are imported only by the fixtures that need them, because tests/conftest.py loads this file everywhere, also
on a GPU machine without them.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from capsfusion_ray.storage import Store


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from moto_server import moto_server

    with moto_server(tmp_path_factory.mktemp("moto") / "log.txt") as url:
        yield url


@pytest.fixture
def s3_client(s3_endpoint: str) -> Any:
    from moto_server import client

    return client("s3", s3_endpoint)


@pytest.fixture
def s3_options(s3_endpoint: str) -> dict[str, str]:
    from moto_server import options

    return options(s3_endpoint)


@pytest.fixture
def bucket(s3_endpoint: str) -> str:
    from moto_server import new_bucket

    return new_bucket(s3_endpoint)


@pytest.fixture(params=["local", "s3", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if request.param == "local":
        return Store(str(tmp_path / "root"))
    if request.param == "memory":
        return Store(f"memory://{uuid.uuid4().hex}/root")
    return Store(f"s3://{request.getfixturevalue('bucket')}/some/root", request.getfixturevalue("s3_options"))
