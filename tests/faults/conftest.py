"""Fixtures: an S3-compatible server (moto, in a process of its own on 127.0.0.1) and a proxy in front of it that injects faults."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from moto_server import client, moto_server, new_bucket
from moto_server import options as moto_server_options
from proxy import FaultProxy, Faults

from capsfusion_ray.storage import Store


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's URL. It accepts any credentials unless `guarded` is used."""
    with moto_server(tmp_path_factory.mktemp("moto") / "log.txt") as url:
        yield url


@pytest.fixture
def bucket(server: str) -> str:
    return new_bucket(server)


@pytest.fixture
def options(server: str) -> dict[str, str]:
    return moto_server_options(server)


@pytest.fixture
def calm(bucket: str, options: dict[str, str]) -> Store:
    """The same store without the proxy."""
    return Store(f"s3://{bucket}/some/root", options)


@pytest.fixture(scope="session")
def proxy_of_all(server: str) -> Iterator[FaultProxy]:
    """One for all tests: each address needs a new S3 client, which costs a second of CPU."""
    with FaultProxy(server) as proxy:
        yield proxy


@pytest.fixture
def proxy(proxy_of_all: FaultProxy) -> Iterator[FaultProxy]:
    """It injects no faults before `proxy.inject(Faults(…), seed)`."""
    proxy_of_all.inject(Faults())
    proxy_of_all.done.clear()
    yield proxy_of_all
    proxy_of_all.inject(Faults())


@pytest.fixture
def store(proxy: FaultProxy, bucket: str, options: dict[str, str]) -> Store:
    """The store of `calm`, through the proxy."""
    return Store(f"s3://{bucket}/some/root", {**options, "endpoint_url": proxy.url})


@pytest.fixture
def guarded(server: str) -> Iterator[Callable[[list[str]], dict[str, str]]]:
    """A function that creates users: actions -> key and secret. While it is used the server checks signatures and policies."""
    iam = client("iam", server)
    _check_credentials(server, "inf")

    def make(actions: list[str]) -> dict[str, str]:
        _check_credentials(server, "inf")
        name = f"u-{uuid.uuid4().hex[:8]}"
        iam.create_user(UserName=name)
        statement = {"Effect": "Allow", "Action": actions, "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        iam.put_user_policy(UserName=name, PolicyName="p", PolicyDocument=policy)
        made = iam.create_access_key(UserName=name)["AccessKey"]
        _check_credentials(server, "0")
        return {"key": made["AccessKeyId"], "secret": made["SecretAccessKey"]}

    yield make
    _check_credentials(server, "inf")


def _check_credentials(server: str, after_requests: str) -> None:
    plain = {"Content-Type": "text/plain"}  # the server ignores it when it is sent as a form
    url = f"{server}/moto-api/reset-auth"
    urllib.request.urlopen(urllib.request.Request(url, after_requests.encode(), plain, method="POST")).close()


@pytest.fixture(autouse=True)
def _no_credentials_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    before = signal.getsignal(signal.SIGTERM)  # a job installs a handler of its own
    yield
    signal.signal(signal.SIGTERM, before)
