"""Start a job as a user does, and measure its process tree: memory by role, CPU seconds, the object store, spilling.

Roles: `driver`, `workers` (Ray's actors and tasks; `largest_worker` is one of them) and `ray` (its daemons). `private` memory
has no shared pages, which are the object store as each worker maps it, and libraries. `store` is the growth of /dev/shm, which
contains the object store. It is that of the whole machine, so no other Ray cluster may run. `spilled` is the data on disk, as the raylet reports it every
10 s. Needs psutil; Linux for `private`, `store` and `spilled`. Knows Ray's process titles and files; starts no Ray itself.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_S = 1.0  # a look walks every process of the machine
SHARED_MEMORY = Path("/dev/shm")
_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # daemons that are titled as workers are
_SPILLED = re.compile(r"num bytes currently spilled: (\d+)")


def job_env() -> dict[str, str]:
    """For a job that starts a Ray of its own."""
    # Without byte code every Ray worker would compile all modules again.
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE")}
    return kept | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


class TreeWatch(threading.Thread):
    """Samples a process and all its descendants until stopped. Memory is in bytes."""

    def __init__(self, pid: int) -> None:
        super().__init__(name="tree-watch", daemon=True)
        self._root = psutil.Process(pid)
        self._over = threading.Event()
        # By pid and birth, so that those which ended stay counted.
        self._cpu: dict[tuple[int, float], tuple[str, float]] = {}
        self._shared_before = shared_memory()
        self._session: Path | None = None
        self.now: dict[str, int] = {}
        self.peaks: dict[str, int] = defaultdict(int)
        self.samples = 0

    def run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self._sample()

    def stop(self) -> None:
        self._over.set()
        self.join()

    @property
    def cpu_s(self) -> dict[str, float]:
        """By role, until now. A process that ended between two samples is counted up to the first."""
        spent: dict[str, float] = defaultdict(float)
        for role, seconds in list(self._cpu.values()):
            spent[role] += seconds
        return dict(spent)

    def _sample(self) -> None:
        now: dict[str, int] = defaultdict(int)
        try:
            tree = [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in tree:
            try:
                with process.oneshot():
                    memory, times = process.memory_info(), process.cpu_times()
                    role = "driver" if process == self._root else role_of(process)
                    birth = process.create_time()
            except psutil.Error:
                continue  # it ended, or is ending
            self._cpu[process.pid, birth] = role, times.user + times.system
            private = memory.rss - getattr(memory, "shared", 0)
            now[role] += memory.rss
            now[f"{role}_private"] += private
            if role == "workers":
                now["largest_worker"] = max(now["largest_worker"], memory.rss)
                now["largest_worker_private"] = max(now["largest_worker_private"], private)
        now["store"] = max(shared_memory() - self._shared_before, 0)
        now["spilled"] = self._spilled(tree)
        self.samples += 1
        self.now = dict(now)
        for name, value in now.items():
            self.peaks[name] = max(self.peaks[name], value)

    def _spilled(self, tree: list[psutil.Process]) -> int:
        self._session = self._session or session_of(tree)
        try:
            text = (self._session / "logs" / "debug_state.txt").read_text() if self._session else ""
        except OSError:  # the raylet writes the first one seconds after its start
            return 0
        found = _SPILLED.search(text)
        return int(found.group(1)) if found else 0


def role_of(process: psutil.Process) -> str:
    """Ray names its workers after what they run: `ray::FusionActor`, `ray::IDLE`, ..."""
    title = " ".join(process.cmdline()[:2])
    worker = title.startswith("ray::") or "default_worker.py" in title
    return "workers" if worker and not title.startswith(_AGENTS) else "ray"


def session_of(tree: list[psutil.Process]) -> Path | None:
    """The folder of the Ray session whose raylet is in the tree."""
    for process in tree:
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if words and words[0].endswith("/raylet"):
            return next((Path(word.partition("=")[2]) for word in words if word.startswith("--session_dir=")), None)
    return None


def shared_memory() -> int:
    """Bytes in use; pages of deleted files too, as the object store's are."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@contextmanager
def watched(process: subprocess.Popen[str], timeout_s: float) -> Iterator[TreeWatch]:
    """Sample a process while it runs; whatever happens, it and its descendants are gone afterwards."""
    watch = TreeWatch(process.pid)
    late = threading.Timer(timeout_s, end_tree, (process.pid,))
    watch.start()
    late.start()
    try:
        yield watch
    finally:
        late.cancel()
        watch.stop()
        if process.poll() is None:
            end_tree(process.pid)


def said_by(command: list[str], log: Path, timeout_s: float, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a job to its end and return what it said last. Its stderr is added to `log`; SystemExit where it fails."""
    with log.open("ab") as stream:
        done = subprocess.run(
            command, cwd=ROOT, env=env or job_env(), stdout=subprocess.PIPE, stderr=stream, text=True, timeout=timeout_s
        )
    _expect_success(command, done.returncode, log)
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


@contextmanager
def watched_job(
    command: list[str], folder: Path, timeout_s: float, env: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], TreeWatch]]:
    """The fuse job, sampled while it runs. Its stderr is added to `folder`/fuse.log; how it ended is for `last_words`."""
    with (folder / "fuse.log").open("ab") as log, (folder / "fuse.out").open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env or job_env(), stdout=out, stderr=log, text=True, start_new_session=True
        )
    with watched(process, timeout_s) as watch:
        yield process, watch


def last_words(process: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    """What a watched job that ran to its end said last; SystemExit where it failed."""
    _expect_success(process.args, process.returncode, folder / "fuse.log")
    said: dict[str, Any] = json.loads((folder / "fuse.out").read_text().splitlines()[-1])
    return said


def _expect_success(command: Any, code: int, log: Path) -> None:
    if code:
        raise SystemExit(f"{' '.join(command)}\nended with exit code {code}; see {log}")


def tell(found: dict[str, Any], file: Path | None) -> None:
    """The figures as the last line on stdout, and in a file where one was asked for."""
    if file:
        file.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found), flush=True)


def end_with_children() -> None:
    """From now on SIGTERM ends this process as Ctrl-C does: through `watched`, so that no job is left behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def end_tree(pid: int) -> None:
    try:
        root = psutil.Process(pid)
        tree = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def figures(what: str, rows: int, seconds: float, watch: TreeWatch) -> dict[str, object]:
    cpu_s = sum(watch.cpu_s.values())
    return {
        "what": what,
        "rows": rows,
        "seconds": round(seconds, 1),
        "rows_per_s": round(rows / seconds),
        "cpu_s": round(cpu_s, 1),  # on a shared machine the clock measures the neighbours
        "rows_per_cpu_s": round(rows / max(cpu_s, 1e-3)),
        "peak_mb": megabytes(watch.peaks),
        "samples": watch.samples,
    }


def megabytes(sizes: dict[str, int]) -> dict[str, int]:
    return {name: round(value / 1e6) for name, value in sorted(sizes.items())}
