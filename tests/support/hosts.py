"""Hosts on one machine: each has a name, an address, processes and a temporary folder of its own, and a cable to one switch.

    with switch():
        one = host("one", 1); one.start(...); one.unplug(); one.plug(); one.kill()

Linux namespaces, by root. The calling thread moves into a network of its own, which holds the switch: threads and processes
that it starts meanwhile reach the hosts, those that it had before do not. Nothing here has a name on the machine, so there is
nothing to clean up: a network is gone with its last process, and a host's processes are killed by the kernel when its first one
ends, which ends with our pipe to it, however we end. Knows nothing of Ray.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

CLONE_NEWNET = 0x40000000  # linux/sched.h
NET = "10.77.0"  # nobody else is in these networks
SWITCH, SWITCH_MAC = "switch", "02:00:00:00:00:fe"
# The first process of a host: it says that the namespaces are there, and reaps whatever is left to it.
FIRST = 'hostname "$0" && echo ready && cat; :'
NAMESPACES = ("--net", "--uts", "--mount", "--pid", "--mount-proc")


def why_not() -> str:
    """Why this machine cannot have hosts; empty where it can."""
    if os.geteuid() != 0:
        return "not root"
    if missing := [tool for tool in ("ip", "unshare", "nsenter") if not shutil.which(tool)]:
        return f"{missing[0]} is not installed"
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "ip", "link", "add", SWITCH, "type", "bridge"],
        capture_output=True,
        text=True,
    )
    return tried.stderr.strip()


def address(number: int) -> str:
    return f"{NET}.{number}"


@contextmanager
def switch() -> Iterator[str]:
    """This thread's network is the switch meanwhile. Its address, on which a server of this process serves all hosts."""
    libc = ctypes.CDLL(None, use_errno=True)

    def must(code: int) -> None:
        if code:
            raise OSError(ctypes.get_errno(), "no network of its own")

    with open("/proc/thread-self/ns/net") as before:
        must(libc.unshare(CLONE_NEWNET))
        try:
            _ip("link set lo up")
            # Of its own, or it would be that of some host's cable, and another with each cable that comes or goes: hosts that
            # remember the old one would send into nothing for half a minute.
            _ip(f"link add {SWITCH} address {SWITCH_MAC} type bridge")
            _ip(f"address add {address(254)}/24 dev {SWITCH}")
            _ip(f"link set {SWITCH} up")
            yield address(254)
        finally:
            must(libc.setns(before.fileno(), CLONE_NEWNET))


@dataclass(frozen=True)
class Host:
    """One host while it lives; `pid` is its first process, as seen from outside."""

    name: str
    address: str
    pid: int

    def start(self, command: Sequence[str], log: Path, env: Mapping[str, str], folder: Path) -> subprocess.Popen[str]:
        """Run a command on the host, in `folder`, with all that it says in `log`; its exit code is the Popen's."""
        enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid", f"--wd={folder}", *command]
        with log.open("wb") as out:
            # A session of its own: a Ctrl-C is the test's alone, and the kernel shares a crowded machine out by sessions.
            return subprocess.Popen(
                enter,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=env,
                text=True,
                start_new_session=True,
            )

    def run(self, command: Sequence[str], log: Path, env: Mapping[str, str], folder: Path) -> str:
        """The same, to its end; what it said. Raises AssertionError unless it exits 0."""
        code = self.start(command, log, env, folder).wait()
        assert code == 0, f"{self.name}: {' '.join(command)}\nended with {code}\n{log.read_text()[-5000:]}"
        return log.read_text()

    def unplug(self) -> None:
        """What is sent to it or by it is lost in silence, as by a switch that fails: both ends stay up."""
        _ip(f"link set {self.name} nomaster")

    def plug(self) -> None:
        _ip(f"link set {self.name} master {SWITCH}")

    def kill(self) -> None:
        """As if its power went: the kernel ends all its processes at once, and its cable is gone."""
        os.kill(self.pid, signal.SIGKILL)

    def processes(self, name: str) -> list[psutil.Process]:
        """Those of that name on this host."""
        here = os.readlink(f"/proc/{self.pid}/ns/pid")
        return [
            found
            for found in psutil.process_iter(["name"])
            if found.info["name"] == name and _namespace(found.pid) == here
        ]


@contextmanager
def host(name: str, number: int) -> Iterator[Host]:
    """A host plugged into the switch; all its processes are gone afterwards."""
    line = ["unshare", *NAMESPACES, "--fork", "--kill-child", "sh", "-c", FIRST, name]
    with subprocess.Popen(
        line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as unshare:
        try:
            assert unshare.stdout
            assert unshare.stdout.readline() == "ready\n", f"no namespaces for {name}"
            (first,) = psutil.Process(unshare.pid).children()
            made = Host(name, address(number), first.pid)
            _ip(f"link add {name} type veth peer name eth0 netns {made.pid}")
            _ip(f"link set {name} up master {SWITCH}")
            inside = f"ip link set lo up && ip address add {made.address}/24 dev eth0 && ip link set eth0 up"
            subprocess.run(["nsenter", f"--target={made.pid}", "--net", "sh", "-c", inside], check=True)
            yield made
        finally:
            unshare.kill()  # --kill-child: its child ends with it, and all others on the host with that one


def wait_until_gone(hosts: Sequence[Host], patience_s: float = 60.0) -> None:
    """Returns once no process of theirs is left. Raises AssertionError after `patience_s`."""
    until = time.monotonic() + patience_s
    while left := [host.name for host in hosts if psutil.pid_exists(host.pid)]:
        assert time.monotonic() < until, f"processes are left on {left}"
        time.sleep(0.1)


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)
