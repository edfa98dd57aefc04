"""Join the Ray cluster that is named, or start one on this machine, and leave it again."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

import ray

from capsfusion_ray.config import ClusterConfig, without_secrets
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.run.pool import Resources
from capsfusion_ray.run.private_cluster import shutdown, start_here, this_machine
from capsfusion_ray.run.ray_private import command_line

# For a head that is just coming up. ray.init waits for minutes, and then aborts the process.
ANSWER_PATIENCE_S = 15.0
_to_undo = ExitStack()  # what connect did to this process; disconnect undoes it, last things first


def named_cluster(cluster: ClusterConfig) -> str:
    """The setting that names a cluster, as `key=address`; empty where none is named and one is started here."""
    if cluster.address != "auto":
        return f"cluster.address={cluster.address}"
    address = os.environ.get("RAY_ADDRESS", "")  # `ray job submit` sets it
    return f"RAY_ADDRESS={address}" if address else ""


def connect(cluster: ClusterConfig) -> Resources:
    """Join the named cluster, or start one here; what it has. Ray's list of jobs shows this command line without secrets.

    A process that has called ray.init itself, such as a notebook, uses that cluster, and `disconnect` leaves it as it is.
    Raises ConfigError where nobody answers there, ClusterError where none can be started, and KeyboardInterrupt for a SIGTERM.
    """
    if ray.is_initialized():
        return _resources(here=False)
    common: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True}
    with _sigterm_interrupts(), command_line(lambda: shlex.join(without_secrets(sys.orig_argv))):
        if named := named_cluster(cluster):
            _join(named, **common)
        else:
            start_here(num_cpus=this_machine().cpus, **common)
        for name in ("ray.data", "ray"):
            logging.getLogger(name).setLevel(logging.WARNING)
    _to_undo.callback(shutdown)
    return _resources(here=not named)


def _resources(here: bool) -> Resources:
    total = ray.cluster_resources()
    return Resources(total.get("CPU", 1.0), total.get("GPU", 0.0), here)


def disconnect() -> None:
    """Leave the cluster that `connect` joined, and end one that it started."""
    _to_undo.close()


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Keep the caller's SIGTERM handler: ray.init sets one of its own, which ends the process with code 15 and no message."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            if callable(before):
                signal.signal(signal.SIGTERM, before)
            elif before is not None:
                # The caller has no handler. Ray's stays until disconnect: it ends the processes that were started here, which
                # the default would not do.
                _to_undo.callback(signal.signal, signal.SIGTERM, before)


def _join(named: str, **options: Any) -> None:
    """Join the cluster that `named_cluster` names; `options` are those of ray.init. Raises ConfigError."""
    address = named.partition("=")[2]
    way_out = "start that cluster, give the address of another, or unset it to run on this machine alone"
    _refuse_silence(named, address, way_out)
    try:
        ray.init(address, **options)
    except Exception as error:  # Ray raises ValueError, ConnectionError, RuntimeError or its own, by what is wrong
        raise ConfigError(
            f"{named}: no Ray cluster that this process can join ({str(error).strip().splitlines()[0]}); {way_out}"
        ) from error


def _refuse_silence(named: str, address: str, way_out: str) -> None:
    """Raises ConfigError where nobody listens at host:port. Other forms of an address are left to Ray."""
    try:
        place = urlsplit(address if "://" in address else f"//{address}")
        host, port = place.hostname, place.port
    except ValueError:
        return
    if place.scheme not in ("", "ray") or not host or not port:
        return
    until = time.monotonic() + ANSWER_PATIENCE_S
    while True:
        try:
            socket.create_connection((host, port), timeout=ANSWER_PATIENCE_S).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise ConfigError(f"{named}: nobody answers there ({error}); {way_out}") from None
        time.sleep(0.5)
