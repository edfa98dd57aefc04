"""A real S3-compatible server: moto, a process of its own, on 127.0.0.1. Any credentials will do."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from ports import free_port

PAGE_KEYS = 20  # keys in one answer to a listing, so that a few objects fill several; Amazon's own: 1000
KEYS = {"key": "demokey", "secret": "demosecret"}


@contextmanager
def moto_server(log: Path, page_keys: int = PAGE_KEYS) -> Iterator[str]:
    """Its URL."""
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("atomic_moto.py")), "-H", "127.0.0.1", "-p", str(port)]
    env = {**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": str(page_keys)}
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=env) as process:
        try:
            deadline = time.monotonic() + 500
            while not _answers(port):
                assert process.poll() is None, f"moto did not start, see {log}"
                assert time.monotonic() < deadline, "moto does not answer"
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()  # it holds nothing that outlives the tests; a starved machine takes minutes to end it politely


def _answers(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@functools.cache
def client(service: str, endpoint: str, key: str = KEYS["key"], secret: str = KEYS["secret"]) -> Any:
    """boto3, not s3fs: an independent look at what is in the bucket."""
    return boto3.client(
        service,
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        # Ceph's radosgw answers 411 to the chunked default of an upload's parts.
        config=Config(request_checksum_calculation="when_required", response_checksum_validation="when_required"),
    )


def new_bucket(endpoint: str) -> str:
    """Makes an empty one; its name."""
    name = f"b-{uuid.uuid4().hex[:12]}"
    client("s3", endpoint).create_bucket(Bucket=name)
    return name


def options(endpoint: str) -> dict[str, str]:
    """What a Store needs to reach it."""
    return {"endpoint_url": endpoint, "region": "us-east-1", **KEYS}
