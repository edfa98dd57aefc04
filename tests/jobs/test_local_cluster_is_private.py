"""A run without an address starts Ray for itself alone: on loopback, with a token of its own, and nothing is left afterwards.

The environment of the driver is that of a user who turned Ray's tokens off and who has a token of another cluster.
"""

import http.client
import importlib
import ipaddress
import json
import os
import pkgutil
import socket
import stat
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
import ray.core.generated
from ray._raylet import AuthenticationMode, get_authentication_mode

from capsfusion_ray.run import private_cluster, ray_private

ROOT = Path(__file__).resolve().parents[2]
OTHER_TOKEN = "0ther-clusters-t0ken"
USER = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": OTHER_TOKEN}
NAMES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_K8S_TOKEN_AUTH")
# It reads lines: "start" starts a cluster and prints what real tasks on it answered; "disconnect" ends the cluster.
DRIVER = f"""
import json, os, sys
import ray
from capsfusion_ray.run.cluster import connect, disconnect
from capsfusion_ray.config import ClusterConfig

@ray.remote
def double(x):
    return 2 * x

@ray.remote
class Counter:
    def __init__(self):
        self.count = 0
    def add(self, x):
        self.count += x
        return self.count

def say(**what):
    print(json.dumps(what), flush=True)

for line in sys.stdin:
    if line.strip() == "start":
        here = connect(ClusterConfig()).here
        counter = Counter.remote()
        ray.get(counter.add.remote(1))
        big = ray.put(bytes(10_000_000))
        say(here=here, answers=[*ray.get([double.remote(x) for x in range(4)]), ray.get(counter.add.remote(2)), len(ray.get(big))])
    elif line.strip() == "disconnect":
        disconnect()
        say(auth={{name: os.environ.get(name) for name in {NAMES}}})
"""
ANSWERS = {"here": True, "answers": [0, 2, 4, 6, 3, 10_000_000]}
# They serve metrics of the cluster without a token, and accept nothing: Ray has no setting that makes them ask for one.
METRICS_PORTS = {
    44217: "the autoscaler's",
    44227: "the dashboard's, which runs without a page",
}  # and the agent's, of AGENT_PORT_RANGE
HEALTH = "/grpc.health.v1.Health/Check"  # says whether the server is up, without a token
HTTP_PATHS = (
    "/",
    "/metrics",
    "/api/job_agent/jobs/",
    "/api/jobs/",
    "/api/version",
    "/api/local_raylet_healthz",
    "/api/healthz",
    "/logs",
    "/nodes",
    "/get_or_create_runtime_env",
    "/delete_runtime_env_if_possible",
    "/get_runtime_envs_info",
)


class Driver:
    def __init__(self):
        env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", *NAMES)} | USER
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return next(json.loads(said) for said in self.process.stdout if said.startswith("{"))

    def tree(self):
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def token_file(self):
        """The path that the daemons have in their environment."""
        gcs = next(process for process in self.tree() if process.name() == "gcs_server")
        return Path(gcs.environ().get("RAY_AUTH_TOKEN_PATH", "/no-token"))

    def end(self):
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait(120)


@contextmanager
def driver():
    driver = Driver()
    try:
        yield driver
    finally:
        driver.end()


@dataclass(frozen=True)
class Listener:
    process: str
    address: str
    port: int


@dataclass(frozen=True)
class Run:
    driver: Driver
    listeners: frozenset[Listener]

    @property
    def token(self):
        return self.driver.token_file().read_text()


@pytest.fixture(scope="module")
def run():
    """A run that has started a cluster, once the agents of Ray are up: tasks run before that."""
    with driver() as started:
        assert started.ask("start") == ANSWERS
        until = time.monotonic() + 120
        before, since = frozenset(), time.monotonic()
        while time.monotonic() - since < 5 or len([one for one in before if "Agent" in one.process]) < 3:
            assert time.monotonic() < until, before
            if (now := listeners(started)) != before:
                before, since = now, time.monotonic()
            time.sleep(0.2)
        print(*sorted(map(str, before)), sep="\n")
        yield Run(started, before)


def listeners(driver):
    """All TCP and UDP sockets on which the processes of a run receive."""
    found = set()
    for process in driver.tree():
        try:
            name = process.name()
            sockets = process.net_connections("inet")
        except psutil.NoSuchProcess:
            continue
        for one in sockets:
            if one.status == psutil.CONN_LISTEN or (one.type == socket.SOCK_DGRAM and not one.raddr):
                found.add(Listener(name, one.laddr.ip, one.laddr.port))
    return frozenset(found)


def test_every_socket_is_on_loopback(run):
    def loopback(address):
        ip = ipaddress.ip_address(address)
        return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback

    names = {one.process for one in run.listeners}
    assert {"gcs_server", "raylet", "ray::RuntimeEnvAgent"} <= names, "the test looks at the right processes"
    assert [one for one in run.listeners if not loopback(one.address)] == []


def request(port, method, path, body, headers):
    """Status and body, or None where the port speaks no HTTP/1.1."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": f"Bearer {OTHER_TOKEN}"}], ids=["no token", "a token of another cluster"]
)
def test_without_the_token_http_runs_no_command_and_serves_only_metrics(run, headers, tmp_path):
    file = tmp_path / "a command ran"
    job = json.dumps({"entrypoint": f"touch '{file}'"})
    headers = headers | {"Content-Type": "application/json"}
    figures, refused, others = set(), set(), []
    for port in {one.port for one in run.listeners}:
        for path in HTTP_PATHS:
            for method in ("GET", "POST", "PUT", "DELETE"):
                answer = request(port, method, path, None if method == "GET" else job, headers)
                if answer is None or answer[0] in (404, 405):
                    continue
                if answer[0] in (401, 403):
                    refused.add(port)
                elif answer[0] == 200 and (answer[1].startswith(b"# HELP") or not answer[1]):
                    figures.add(port)
                else:
                    others.append((method, path, port, answer))
    time.sleep(3)  # a job that was accepted takes a moment to begin
    assert not file.exists()
    assert others == []
    assert len(refused) == 1, "the agent of runtime environments refuses; the agent of jobs serves no HTTP"
    (agents,) = figures - METRICS_PORTS.keys()
    assert agents in private_cluster.AGENT_PORT_RANGE


def test_the_token_of_the_run_is_accepted(run):
    """With the token the request is answered that was refused without it."""
    headers = {"Authorization": f"Bearer {run.token}"}
    answers = [
        request(one.port, "POST", "/get_runtime_envs_info", b"", headers)
        for one in run.listeners
        if one.process == "ray::RuntimeEnvAgent"
    ]
    assert [answer[0] for answer in answers] == [200]


def methods():
    """Every gRPC method that Ray has, as a path."""
    package = ray.core.generated
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if module.name.endswith("_pb2"):
            for service in importlib.import_module(module.name).DESCRIPTOR.services_by_name.values():
                yield from (f"/{service.full_name}/{method.name}" for method in service.methods)
    yield from (
        f"/ray.rpc.ObjectManagerService/{name}" for name in ("Push", "Pull", "FreeObjects")
    )  # a service that only Ray's C++ code has
    yield HEALTH


@pytest.mark.parametrize(
    "metadata", [(), (("authorization", f"Bearer {OTHER_TOKEN}"),)], ids=["no token", "a token of another cluster"]
)
def test_without_the_token_no_grpc_method_answers(run, metadata):
    refused, answered = Counter(), []
    for one in run.listeners:
        seen = set()
        with grpc.insecure_channel(f"127.0.0.1:{one.port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
            for method in methods():
                try:
                    channel.unary_unary(method)(b"", timeout=5, metadata=metadata)
                    answered.append((one, method, "answered"))
                except grpc.RpcError as error:
                    if error.code() == grpc.StatusCode.UNAVAILABLE:
                        break  # it speaks no gRPC
                    if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                        seen.add(one.process)
                    elif error.code() != grpc.StatusCode.UNIMPLEMENTED:
                        answered.append((one, method, error.code()))
        refused.update(seen)
    print(refused)
    assert {method for _, method, _ in answered} <= {HEALTH}, answered
    servers = {
        "gcs_server": 1,
        "raylet": 2,
        "ray::DashboardAgent": 1,
        "ray::Counter": 1,
    }  # raylet: of nodes and of objects
    assert Counter(servers) <= refused, "the driver and the other workers refuse too"


def test_the_token_is_in_no_command_line_and_no_log_and_only_the_user_can_read_it(run):
    file = run.driver.token_file()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    token = run.token
    assert len(token) == 64
    lines = [" ".join(process.cmdline()) for process in run.driver.tree()]
    assert len(lines) > 6
    assert not [line for line in lines if token in line]
    (session,) = {
        word.partition("=")[2] for line in lines for word in line.split() if word.startswith("--session_dir=")
    }
    logs = [path for path in Path(session).rglob("*") if path.is_file()]
    assert len(logs) > 10
    assert not [path for path in logs if token.encode() in path.read_bytes()]


@pytest.mark.parametrize("last", ["disconnect", "exit"])
def test_each_cluster_has_a_token_of_its_own_and_leaves_nothing(last):
    """Two clusters, one after the other, in one process; the second ends with `disconnect`, or with the process."""
    with driver() as started:
        assert started.ask("start") == ANSWERS
        first, token = started.token_file(), started.token_file().read_text()
        processes = started.tree()
        after = started.ask("disconnect")
        assert after == {"auth": dict.fromkeys(NAMES) | USER}, "the settings of the user are restored"
        assert not first.parent.exists()
        assert started.ask("start") == ANSWERS
        second = started.token_file()
        assert second.read_text() != token
        processes += started.tree()
        if last == "disconnect":
            started.ask("disconnect")
            assert not second.parent.exists()
        assert started.end() == 0
        assert not second.parent.exists()
    _, alive = psutil.wait_procs(set(processes), timeout=60)
    assert not alive


@pytest.fixture
def ray_reads_the_environment_again():
    """monkeypatch restores the variables; Ray must read them again."""
    yield
    ray_private.set_auth({name: os.environ.get(name) for name in NAMES})


@pytest.mark.parametrize(
    "user",
    [{}, USER, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/a/file", "RAY_ENABLE_K8S_TOKEN_AUTH": "true"}],
)
def test_settings_of_the_user_do_not_change_the_token_and_are_restored(
    user, ray_reads_the_environment_again, monkeypatch
):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in user.items():
        monkeypatch.setenv(name, value)
    ray_private.set_auth(dict.fromkeys(NAMES) | user)
    mode = AuthenticationMode.TOKEN if user.get("RAY_AUTH_MODE") == "token" else AuthenticationMode.DISABLED
    with private_cluster._token_of_this_run():
        assert get_authentication_mode() == AuthenticationMode.TOKEN
        file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert {name: os.environ.get(name) for name in NAMES} == dict.fromkeys(NAMES) | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(file),
        }
        assert file.exists()
    assert not file.parent.exists()
    assert {name: os.environ.get(name) for name in NAMES} == dict.fromkeys(NAMES) | user
    assert get_authentication_mode() == mode, "and Ray has read them again"
