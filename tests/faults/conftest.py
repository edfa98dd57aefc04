"""A real S3-compatible server (moto, a process of its own, on 127.0.0.1) and a proxy in front of it that injects faults."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from proxy import PAGE_KEYS, FaultProxy, Faults

from capsfusion_ray.storage import Store

ROOT_KEYS = {"key": "rootkey", "secret": "rootsecret"}


@functools.cache
def client(service: str, endpoint: str) -> Any:
    """boto3, not s3fs: an independent look at what is in the bucket."""
    return boto3.client(
        service,
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=ROOT_KEYS["key"],
        aws_secret_access_key=ROOT_KEYS["secret"],
    )


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its URL. Any credentials will do, until `guarded` asks for more."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    with (tmp_path_factory.mktemp("moto") / "log.txt").open("wb") as log:
        command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE_KEYS)}
        )
        try:
            deadline = time.monotonic() + 500
            while not _answers(port):
                assert process.poll() is None, "moto did not start"
                assert time.monotonic() < deadline, "moto does not answer"
                time.sleep(0.1)
            yield url
        finally:
            process.kill()  # it holds nothing that is worth a farewell
            process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def bucket(server: str) -> str:
    name = f"b-{uuid.uuid4().hex[:12]}"
    client("s3", server).create_bucket(Bucket=name)
    return name


@pytest.fixture
def options(server: str) -> dict[str, str]:
    return {"endpoint_url": server, "region": "us-east-1", **ROOT_KEYS}


@pytest.fixture
def calm(bucket: str, options: dict[str, str]) -> Store:
    """The store itself, without a proxy."""
    return Store(f"s3://{bucket}/some/root", options)


@pytest.fixture(scope="session")
def proxy_of_all(server: str) -> Iterator[FaultProxy]:
    """One for all tests, because each address costs a new S3 client, and each of these a second of CPU."""
    with FaultProxy(server) as proxy:
        yield proxy


@pytest.fixture
def proxy(proxy_of_all: FaultProxy) -> Iterator[FaultProxy]:
    """Without faults, until some are assigned to it: `proxy.inject(Faults(…), seed)`."""
    proxy_of_all.inject(Faults())
    proxy_of_all.done.clear()
    yield proxy_of_all
    proxy_of_all.inject(Faults())


@pytest.fixture
def store(proxy: FaultProxy, bucket: str, options: dict[str, str]) -> Store:
    """The store of `calm`, behind the proxy."""
    return Store(f"s3://{bucket}/some/root", {**options, "endpoint_url": proxy.url})


@pytest.fixture
def guarded(server: str) -> Iterator[Callable[[list[str]], dict[str, str]]]:
    """While used, the server checks signatures and policies. Makes users: actions -> key and secret."""
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
    plain = {"Content-Type": "text/plain"}  # as a form, the server would not see it
    url = f"{server}/moto-api/reset-auth"
    urllib.request.urlopen(urllib.request.Request(url, after_requests.encode(), plain, method="POST")).close()


@pytest.fixture(autouse=True)
def _no_credentials_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    before = signal.getsignal(signal.SIGTERM)  # a job's door installs its own
    yield
    signal.signal(signal.SIGTERM, before)
