"""The Ray cluster at hand: connect or start, and resolve the actor pool for what it has."""

from __future__ import annotations

import atexit
import dataclasses
import inspect
import logging
import os
import random
import secrets
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray._private import accelerators, services
from ray._private import utils as ray_utils
from ray._raylet import (  # type: ignore[attr-defined]  # compiled
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    AuthenticationTokenLoader,
    Config,
    persist_port,
)
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from capsfusion_ray.config import ClusterConfig, EngineConfig, without_secrets
from capsfusion_ray.errors import ClusterError, ConfigError
from capsfusion_ray.models.cache import folder_of
from capsfusion_ray.models.location import locate, store_of
from capsfusion_ray.run.pipeline import READ_CPUS, Pool, as_raised

log = logging.getLogger(__name__)
_to_undo = ExitStack()  # what start_here changed in this process, and the folder that it made
START_PATIENCE_S = 300
ANSWER_PATIENCE_S = 15.0  # for a head that is just coming up; ray.init waits for minutes, and then aborts the process
AGENT_PORT_RANGE = range(20_000, 32_000)
NO_PORT = -1  # no server can listen there
LOOPBACK = "127.0.0.1"
TOKEN_FILE = "auth_token"
AGENT_PORTS = ("metrics_agent_port", "runtime_env_agent_port", "dashboard_agent_listen_port", "metrics_export_port")


@dataclass(frozen=True)
class Resources:
    """What the cluster has in all, when the run starts."""

    cpus: float
    gpus: float
    here: bool  # started by this process, on this machine alone


def named(cluster: ClusterConfig) -> str:
    """The key and the address of the cluster that is asked for; empty: one is started here."""
    if cluster.address != "auto":
        return f"cluster.address={cluster.address}"
    address = os.environ.get("RAY_ADDRESS", "")  # `ray job submit` sets it
    return f"RAY_ADDRESS={address}" if address else ""


def this_machine() -> Resources:
    """What a cluster started here would have."""
    gpus = accelerators.get_accelerator_manager_for_resource("GPU").get_current_node_num_accelerators()
    # One logical CPU beside the cores: reads and commits wait on the store, and actors may hold every core.
    return Resources((os.cpu_count() or 1) + 1, gpus, here=True)


def connect(cluster: ClusterConfig) -> Resources:
    """Join the cluster named by cluster.address or RAY_ADDRESS, else start one here. Ray's list of jobs is told no secret.

    Raises ConfigError where nobody answers there, ClusterError where none can be started, and KeyboardInterrupt for a SIGTERM.
    """
    common: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True}
    with _sigterm_interrupts(), _secrets_kept():
        if asked := named(cluster):
            _join(asked, **common)
        else:
            start_here(num_cpus=this_machine().cpus, **common)
        for name in ("ray.data", "ray"):
            logging.getLogger(name).setLevel(logging.WARNING)
        total = ray.cluster_resources()
    return Resources(total.get("CPU", 1.0), total.get("GPU", 0.0), here=not asked)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """ray.init sets a handler of its own, which ends the process with code 15 and without a word: the caller's comes back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        raise KeyboardInterrupt from None
    finally:
        # Without one of the caller's, Ray's stays: it ends the processes that were started here, the system's would not.
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _secrets_kept() -> Iterator[None]:
    """Ray keeps a driver's command line, and shows it to whoever sees the cluster; keys of a store may stand in it."""
    named = ray_utils.get_entrypoint_name
    ray_utils.get_entrypoint_name = lambda: shlex.join(without_secrets(sys.orig_argv))
    try:
        yield
    finally:
        ray_utils.get_entrypoint_name = named


def _join(asked: str, **options: Any) -> None:
    """`asked`: as `named` says it. Raises ConfigError."""
    address = asked.partition("=")[2]
    way_out = "start that cluster, give the address of another, or unset it to run on this machine alone"
    _refuse_silence(asked, address, way_out)
    try:
        ray.init(address, **options)
    except Exception as error:  # Ray raises ValueError, ConnectionError, RuntimeError or its own, by what is wrong
        raise ConfigError(
            f"{asked}: no Ray cluster that this process can join ({str(error).strip().splitlines()[0]}); {way_out}"
        ) from error


def _refuse_silence(asked: str, address: str, way_out: str) -> None:
    """Raises ConfigError where nobody listens at host:port. Other forms of an address are for Ray to judge."""
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
                raise ConfigError(f"{asked}: nobody answers there ({error}); {way_out}") from None
        time.sleep(0.5)


def start_here(**options: Any) -> None:
    """Start Ray on this machine alone, for this run alone; `options` are ray.init's.

    It listens on 127.0.0.1 only, and it answers only who has this run's token. docs/security.md says what Ray leaves open.
    Raises ClusterError where it does not come up.
    """
    with ExitStack() as started:
        started.enter_context(_token_of_this_run())
        with patient_start(), _on_loopback():
            try:
                ray.init("local", include_dashboard=False, _node_ip_address=LOOPBACK, **options)
            except Exception as error:  # Ray raises a bare Exception here, nothing narrower
                raise ClusterError(f"Ray did not start on this machine: {error}") from error
        atexit.register(disconnect)  # for a process that ends without it: Ray first, then the token
        _to_undo.push(started.pop_all())


@contextmanager
def _token_of_this_run() -> Iterator[None]:
    """Ray asks for a token, whatever the user's RAY_AUTH_MODE is: the user's own settings may be those of another cluster.

    The token is new, and it stands in a file that only this user can read; all processes of Ray find the file by their environment.
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
        _set_auth(ours)
        try:
            yield
        finally:
            _set_auth(before)


def _set_auth(settings: Mapping[str, str | None]) -> None:
    """Set these environment variables, or unset them where there is no value, and let Ray read them again."""
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
def _on_loopback() -> Iterator[None]:
    """While Ray is started: every server that follows the node's address listens on 127.0.0.1, and the agent serves no HTTP.

    The agent's HTTP server takes jobs, even where the dashboard is off. Nothing else here needs it.
    """
    resolve, start_raylet = services.resolve_ip_for_localhost, services.start_raylet

    def without_agent_http(*args: Any, **kwargs: Any) -> Any:
        # Ray 2.60 has no setting to turn that server off. If its port cannot be bound, the agent logs it and goes on without.
        return start_raylet(*args, **kwargs | {"dashboard_agent_listen_port": NO_PORT})

    # Otherwise ray.init replaces 127.0.0.1 by an address that other machines reach.
    services.resolve_ip_for_localhost, services.start_raylet = lambda host: host, without_agent_http
    try:
        yield
    finally:
        services.resolve_ip_for_localhost, services.start_raylet = resolve, start_raylet


@contextmanager
def patient_start() -> Iterator[None]:
    """While Ray's processes are started on this machine: minutes to come up, and a fair share of its CPU for workers."""
    os.environ.setdefault(
        "RAY_AUTH_MODE", "disabled"
    )  # start_here has set it; since 2.59 Ray may turn tokens on by itself
    os.environ.setdefault("RAY_worker_register_timeout_seconds", str(START_PATIENCE_S))
    # Ray's own is 15: then its dozen idle daemons, at 0, take a starved machine's CPU from the one process that fuses.
    os.environ.setdefault("RAY_worker_niceness", "0")
    get_node, start_raylet = services.get_node, services.start_raylet

    def patient(*args: Any) -> Any:
        until = time.monotonic() + START_PATIENCE_S
        while True:
            try:
                return get_node(*args)
            except RuntimeError:  # not registered yet
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)

    def with_ports(*args: Any, **kwargs: Any) -> Any:
        free = _free_ports()
        kwargs |= {name: kwargs.get(name) or next(free) for name in AGENT_PORTS}
        asked = inspect.signature(start_raylet).bind(*args, **kwargs).arguments
        # This one port the raylet wants to read from the agent's file even where it is known.
        name, port = DASHBOARD_AGENT_LISTEN_PORT_NAME, kwargs["dashboard_agent_listen_port"]
        persist_port(asked["session_dir"], asked["node_id"], name, port)
        return start_raylet(*args, **kwargs)

    # Ray 2.60 gives its raylet 15 s to hear from two Python agents, unless their ports are told to it, and 30 s to appear
    # (ray/_private/node.py); neither can be set through ray.init, and a loaded laptop needs minutes. Both steps go through
    # these two functions, so the ports are told here, and waiting here is waiting there.
    services.get_node, services.start_raylet = patient, with_ports
    try:
        yield
    finally:
        services.get_node, services.start_raylet = get_node, start_raylet


def _free_ports() -> Iterator[int]:
    """Ports that nobody listens on, below those that the kernel gives to outgoing connections.

    An agent binds its port up to a minute after it was told: a port of the kernel's own choice may be taken by then.
    """
    for port in random.sample(AGENT_PORT_RANGE, len(AGENT_PORT_RANGE)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        yield port


def disconnect() -> None:
    """Leave the cluster. One that was started here ends, and then its token goes."""
    sys.stderr.flush()
    ray.shutdown()
    _to_undo.close()
    atexit.unregister(disconnect)


def resolve_pool(cluster: ClusterConfig, engine: EngineConfig, resources: Resources, units: int) -> Pool:
    """How many actors, and what each asks for. Raises ConfigError for a pool that this cluster cannot hold."""
    gpus, split = cluster.gpus_per_actor, engine.vllm.tensor_parallel
    if gpus is None:
        gpus = 0.0 if engine.device == "cpu" or not engine.loads_model or not resources.gpus else float(split)
    if gpus > 1 and engine.kind != "vllm":
        raise ConfigError(
            f"cluster.gpus_per_actor={gpus:g}: engine.kind={engine.kind} uses one GPU an actor; give at most 1, or engine.kind=vllm "
            "engine.vllm.tensor_parallel=… for a model that does not fit one GPU"
        )
    if max(gpus, 1) != split and gpus:
        raise ConfigError(
            f"cluster.gpus_per_actor={gpus:g} with engine.vllm.tensor_parallel={split}: give the same number"
        )
    if gpus and resources.here and resources.gpus < gpus * cluster.min_actors:
        raise ConfigError(
            f"cluster.gpus_per_actor={gpus:g} with cluster.min_actors={cluster.min_actors}: this machine has {resources.gpus:g} "
            "GPUs; give cluster.gpus_per_actor=0 to run on the CPU"
        )
    fits = int(resources.gpus / gpus) if gpus else int(max(resources.cpus - 1, 1) / cluster.cpus_per_actor)
    wanted = cluster.max_actors or max(fits, cluster.min_actors)
    wanted = max(min(wanted, units), 1)  # more actors than units would load models for nothing
    cpus = cluster.cpus_per_actor
    # Leave room to read: with one CPU a node, an idle actor could hold the only one and starve the reads.
    spare = resources.cpus - 4 * READ_CPUS
    if resources.here and wanted * cpus > spare:
        cpus = max(spare / wanted, 0.01)
    return Pool(min(cluster.min_actors, wanted), wanted, round(cpus, 3), gpus, cluster.units_in_flight)


def resolve_engine(engine: EngineConfig, pool: Pool, resources: Resources) -> EngineConfig:
    """Fill in what depends on the machine: dtype and device by GPU, CPU threads by the actor's share of the cores.

    The model is fetched on every node that may hold an actor now; one that comes later fetches it when its first actor starts.
    """
    _spread_model(engine, pool, resources)
    device = engine.device if engine.device != "auto" else ("cuda" if pool.gpus_per_actor else "cpu")
    dtype = engine.dtype if engine.dtype != "auto" else ("bfloat16" if device == "cuda" else "float32")
    threads = engine.threads
    if threads is None and resources.here and device == "cpu":
        threads = max((os.cpu_count() or 1) // pool.max_actors, 1)
    return dataclasses.replace(engine, device=device, dtype=dtype, threads=threads)


def _spread_model(engine: EngineConfig, pool: Pool, resources: Resources) -> None:
    """Raises what `folder_of` raises on any node: before the pool, in one line, and for a folder that is not the same on all."""
    if not engine.loads_model:
        return
    fetched = store_of(engine) is None or "://" in engine.model
    if resources.here:
        if fetched:
            folder_of(engine)
        return
    fit = [node["NodeID"] for node in ray.nodes() if node["Alive"] and _holds(node["Resources"], pool)]
    log.info("looking for %s on %d nodes", locate(engine.model), len(fit))
    began = time.monotonic()
    # Waiting and reading take no CPU to speak of, and a node whose CPUs are all taken must not hold the others up.
    task = ray.remote(folder_of)
    there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in fit]
    asked = [task.options(num_cpus=0, max_retries=3, scheduling_strategy=node).remote(engine) for node in there]
    gone = 0
    with as_raised():
        for answer in asked:
            try:
                ray.get(answer)
            except RayTaskError:
                raise
            except ray.exceptions.RayError:  # a node that left meanwhile; actors look for the model themselves
                gone += 1
    log.info("the model is on %d nodes, after %.0f s", len(fit) - gone, time.monotonic() - began)


def _holds(resources: dict[str, float], pool: Pool) -> bool:
    return resources.get("CPU", 0.0) >= pool.cpus_per_actor and resources.get("GPU", 0.0) >= pool.gpus_per_actor
