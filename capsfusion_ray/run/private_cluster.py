"""Start a Ray cluster on this machine, for this run alone. docs/security.md says what Ray leaves open all the same."""

from __future__ import annotations

import atexit
import os
import random
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray

from capsfusion_ray.errors import ClusterError
from capsfusion_ray.run.pool import Resources
from capsfusion_ray.run.ray_private import gpus_of_this_machine, patient_raylet, servers_on_loopback, set_auth

START_PATIENCE_S = 300
AGENT_PORT_RANGE = range(20_000, 32_000)  # below the ports that the kernel gives to outgoing connections
LOOPBACK = "127.0.0.1"
TOKEN_FILE = "auth_token"
_to_undo = ExitStack()  # what start_here changed in this process, and the folder that it made


def this_machine() -> Resources:
    """What a cluster started here would have."""
    # One logical CPU beside the cores: reads and commits wait for the store, and actors may hold every core.
    return Resources((os.cpu_count() or 1) + 1, gpus_of_this_machine(), here=True)


def start_here(**options: Any) -> None:
    """Start Ray on this machine; `options` are those of ray.init. It ends with `shutdown`, or with this process.

    It listens on 127.0.0.1 only, and answers only those who have this run's token. Raises ClusterError where it does not
    come up.
    """
    with ExitStack() as started:
        started.enter_context(_token_of_this_run())
        with patient_start(), servers_on_loopback():
            try:
                ray.init("local", include_dashboard=False, _node_ip_address=LOOPBACK, **options)
            except Exception as error:  # Ray raises a bare Exception here, nothing narrower
                raise ClusterError(f"Ray did not start on this machine: {error}") from error
        atexit.register(shutdown)  # for a process that ends without calling it: Ray first, then the token
        _to_undo.push(started.pop_all())


def shutdown() -> None:
    """Leave the cluster of this process. One that was started here ends, and then its token is deleted."""
    sys.stderr.flush()
    ray.shutdown()
    _to_undo.close()
    atexit.unregister(shutdown)


@contextmanager
def _token_of_this_run() -> Iterator[None]:
    """Let Ray ask for a new token, whatever the user's RAY_AUTH_MODE is: those settings may be for another cluster.

    The token is in a file that only this user can read; all processes of Ray find the file by their environment.
    """
    with tempfile.TemporaryDirectory(prefix="capsfusion-") as folder:  # of mode 0700
        file = Path(folder) / TOKEN_FILE
        file.touch(mode=0o600)
        file.write_text(secrets.token_hex(32), encoding="ascii")
        # Ray prefers RAY_AUTH_TOKEN to a file, and can have tokens checked by a Kubernetes that is not here.
        ours = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(file),
            "RAY_AUTH_TOKEN": None,
            "RAY_ENABLE_K8S_TOKEN_AUTH": None,
        }
        before = {name: os.environ.get(name) for name in ours}
        set_auth(ours)
        try:
            yield
        finally:
            set_auth(before)


@contextmanager
def patient_start() -> Iterator[None]:
    """While Ray's processes are started on this machine: give them minutes to come up, and workers a fair share of its CPU."""
    # start_here has set it already; without it, Ray may ask for tokens by itself since 2.59.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_worker_register_timeout_seconds", str(START_PATIENCE_S))
    # Ray's own value is 15: then its dozen idle daemons, at 0, take a starved machine's CPU from the one process that fuses.
    os.environ.setdefault("RAY_worker_niceness", "0")
    with patient_raylet(START_PATIENCE_S, _free_ports):
        yield


def _free_ports() -> Iterator[int]:
    """Ports of AGENT_PORT_RANGE that nobody listens on.

    An agent binds its port up to a minute after it was given: a port that the kernel chose may be taken by then.
    """
    for port in random.sample(AGENT_PORT_RANGE, len(AGENT_PORT_RANGE)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        yield port
