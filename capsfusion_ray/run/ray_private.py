"""All that this package uses of Ray beyond its public API, each with the reason. tests/run/test_ray_private.py checks all of it.

Ray may change any of these in any release; pyproject.toml therefore pins ray below 3. What is used:

- `_private.services.get_node`, `.start_raylet` (replaced while Ray starts): Ray 2.60 gives its raylet 15 s to hear from
  two Python agents, unless their ports are given to it, and 30 s to appear (ray/_private/node.py). Neither can be set
  through `ray.init`, and a loaded laptop needs minutes.
- `_raylet.persist_port`, `DASHBOARD_AGENT_LISTEN_PORT_NAME`: the raylet reads this one port from the agent's file even
  where it was given.
- `_private.services.resolve_ip_for_localhost` (replaced while Ray starts): `ray.init` replaces 127.0.0.1 by an address
  that other machines reach.
- `start_raylet(dashboard_agent_listen_port=…)`: the agent's HTTP server takes jobs even where the dashboard is off, and
  Ray 2.60 has no setting that turns it off. If its port cannot be bound, the agent logs that and works without it.
- `_raylet.Config`, `AuthenticationTokenLoader`: Ray reads its authentication settings once per process; a process that
  starts a cluster with a token of its own must let it read them again.
- `_private.utils.get_entrypoint_name` (replaced while a driver connects): Ray keeps a driver's command line and shows it
  to all who see the cluster; keys of a store may be in it.
- `_private.accelerators`: how many GPUs a cluster that is started on this machine would have.
- `_private.worker.global_worker.gcs_client.get_draining_nodes`: which nodes will be taken away, and when.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray._private import accelerators, services, worker
from ray._private import utils as ray_utils
from ray._raylet import (  # type: ignore[attr-defined]  # compiled
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    AuthenticationTokenLoader,
    Config,
    persist_port,
)

NO_PORT = -1  # no server can listen there
AGENT_PORTS = ("metrics_agent_port", "runtime_env_agent_port", "dashboard_agent_listen_port", "metrics_export_port")


def gpus_of_this_machine() -> int:
    return int(accelerators.get_accelerator_manager_for_resource("GPU").get_current_node_num_accelerators())


def draining_nodes(timeout_s: float) -> dict[str, int]:
    """Id of each node that will be taken away -> when, in Unix milliseconds; 0 where that is not known.

    Raises ray.exceptions.RayError where the head does not answer.
    """
    found: dict[str, int] = worker.global_worker.gcs_client.get_draining_nodes(timeout=timeout_s)
    return found


@contextmanager
def command_line(shown: Callable[[], str]) -> Iterator[None]:
    """While a driver connects: Ray stores `shown()` as its command line."""
    before = ray_utils.get_entrypoint_name
    ray_utils.get_entrypoint_name = shown
    try:
        yield
    finally:
        ray_utils.get_entrypoint_name = before


def set_auth(settings: Mapping[str, str | None]) -> None:
    """Set these environment variables, unset those whose value is None, and let Ray read its authentication settings again."""
    # Ray keeps the mode that it has where the variable is not set, so it must read its default before that is unset.
    os.environ["RAY_AUTH_MODE"] = settings["RAY_AUTH_MODE"] or "disabled"
    Config.initialize("")
    for name, value in settings.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def servers_on_loopback() -> Iterator[None]:
    """While Ray is started: every server that follows the node's address listens on 127.0.0.1, and the agent serves no HTTP."""
    resolve, start_raylet = services.resolve_ip_for_localhost, services.start_raylet

    def without_agent_http(*args: Any, **kwargs: Any) -> Any:
        return start_raylet(*args, **kwargs | {"dashboard_agent_listen_port": NO_PORT})

    services.resolve_ip_for_localhost, services.start_raylet = lambda host: host, without_agent_http
    try:
        yield
    finally:
        services.resolve_ip_for_localhost, services.start_raylet = resolve, start_raylet


@contextmanager
def patient_raylet(patience_s: float, free_ports: Callable[[], Iterator[int]]) -> Iterator[None]:
    """While Ray is started: wait up to `patience_s` for the raylet, and give it the ports of its agents.

    `free_ports` yields ports that nobody listens on, for the agents that were given none.
    """
    get_node, start_raylet = services.get_node, services.start_raylet

    def patient(*args: Any) -> Any:
        until = time.monotonic() + patience_s
        while True:
            try:
                return get_node(*args)
            except RuntimeError:  # it has not registered yet
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)

    def with_ports(*args: Any, **kwargs: Any) -> Any:
        free = free_ports()
        kwargs |= {name: kwargs.get(name) or next(free) for name in AGENT_PORTS}
        asked = inspect.signature(start_raylet).bind(*args, **kwargs).arguments
        name, port = DASHBOARD_AGENT_LISTEN_PORT_NAME, kwargs["dashboard_agent_listen_port"]
        persist_port(asked["session_dir"], asked["node_id"], name, port)
        return start_raylet(*args, **kwargs)

    services.get_node, services.start_raylet = patient, with_ports
    try:
        yield
    finally:
        services.get_node, services.start_raylet = get_node, start_raylet
