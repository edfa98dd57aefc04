"""Random faults against the real job on a local cluster, for a given time: make chaos SEED=1 MINUTES=60

The input are the captions of the demo; the embedded model fuses them, on a Ray cluster of three nodes, from and to an S3
server behind a proxy. An undisturbed run comes first: its rows are the expected ones. Then come rounds. Each round fuses
into an output of its own while one to three faults (faults.py) hit it, and repeats the same command until it ends well.
Then `jobs/verify.py deep=true` must exit 0, and every row must be equal to that of the undisturbed run: captions, outcome,
reason and flags. Some rounds continue with a retry or a takedown that is hit too.

The engine is the real one. A stalled engine is simulated by a stopped process, out of memory by a cgroup without free
memory, and a poison row by a SIGKILL whenever the row is about to be fused. The cgroup, and the small tmpfs that stands for
a full disk, need root; without root these two are left out, with a message. Not simulated: the loss of the head node, a
network partition, faults of a GPU.

    python tests/chaos/chaos.py --seed 1 --minutes 60 [--only ROUND]

The exit code is 1 if any round failed; the output and the logs of that round are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import psutil
import pyarrow.parquet as pq
from cgroup import tight_cgroup
from faults import (
    ABSENT_S,
    IN_RETRY,
    IN_TAKEDOWN,
    STALL_S,
    ActorStalled,
    DriverKilled,
    DriverTerminated,
    Fault,
    NodeKilled,
    OutOfMemory,
    PoisonRow,
    SecondDriver,
    WorkerKilled,
    draw,
    path_of,
)
from moto_server import client, moto_server, options
from proxy import Faults
from world import ROOT, Job, Jobs, Nodes, WatchedProxy, end_all, mark

from capsfusion_ray.cli import EXIT_FAILED, EXIT_USAGE

MEMORY, DISK = "out of memory", "disk full"
STRIKES: dict[str, type[Fault]] = {
    "driver SIGKILL": DriverKilled,
    "driver SIGTERM": DriverTerminated,
    "worker SIGKILL": WorkerKilled,
    "node SIGKILL": NodeKilled,
    "stalled engine": ActorStalled,
    MEMORY: OutOfMemory,
    "two drivers": SecondDriver,
    "poison row": PoisonRow,
}
STORE = {"S3 faults at 10%": 0.1, "S3 faults at 30%": 0.3}
EDITS = {"kill during retry": IN_RETRY, "kill during takedown": IN_TAKEDOWN}
KINDS = (*STRIKES, *STORE, *EDITS, DISK)

BUCKET = "chaos"
ARGS = (
    "source.passthrough=[WIDTH,punsafe]",
    "unit.rows=12",
    "output.target_file_rows=40",
    f"engine.stall_s={STALL_S:g}",
    "engine.kind=beam",
    "engine.dtype=float32",
    "engine.threads=1",
    "engine.slots=24",
    "cluster.max_actors=2",
    "cluster.cpus_per_actor=0.5",
)
RETRY = ("retry=rejected", "gates.unsupported_number.action=flag", "gates.too_short.action=flag")
TAKEN_DOWN = 12  # rows that one takedown removes
MAX_STARTS = 8  # of one command; the faults of a round cannot end as many
# The longest time for one start of a command: 600 s (undisturbed it takes half a minute), or 10 times what it took here.
PATIENCE_S = 600.0
PATIENCE = 10
DISK_KB = (80, 400)  # size of the full disk; the parts and files of one run need more
FULL = "No space left on device"

Rows = dict[str, dict[str, Any]]  # by row id


class Failed(Exception):
    """A round did not end as it must."""


class Chaos:
    """One whole session: the cluster, the expected rows, the rounds and their results."""

    def __init__(self, seed: int, folder: Path, nodes: Nodes, proxy: WatchedProxy, server: str) -> None:
        self.seed, self.folder, self.nodes, self.proxy, self.server = seed, folder, nodes, proxy, server
        self.jobs = Jobs(nodes.address)
        self.patience_s = PATIENCE_S
        possible = {DISK: _can_mount(folder), MEMORY: tight_cgroup() is not None}
        self.kinds = [kind for kind in KINDS if possible.get(kind, True)]
        for kind in set(KINDS) - set(self.kinds):
            say(f"{kind}: left out, because it needs root")
        self.drawn: Counter[str] = Counter()
        self.struck: Counter[str] = Counter()
        self.starts: Counter[str] = Counter()
        self.failures: list[str] = []

    def prepare(self) -> None:
        """Upload the input, and make the expected rows: after an undisturbed run, and after an undisturbed retry."""
        client("s3", self.server).create_bucket(Bucket=BUCKET)
        for shard in sorted((ROOT / "examples/captions").iterdir()):
            client("s3", self.server).put_object(Bucket=BUCKET, Key=f"in/{shard.name}", Body=shard.read_bytes())
        calm, began = Round(self, -1), time.monotonic()
        calm.until_done("fuse", *calm.args)
        self.patience_s = max(PATIENCE_S, PATIENCE * (time.monotonic() - began))
        self.truth = calm.verified_rows()
        calm.until_done("fuse", *calm.args, *RETRY)
        self.retried = calm.verified_rows()
        changed = sum(self.truth[row] != self.retried[row] for row in self.truth)
        if not changed:
            raise Failed("the undisturbed retry changed no row, so rounds with a retry would test nothing")
        rejected = sum(row["in"] == "rejected" for row in self.truth.values())
        say(f"undisturbed: {len(self.truth)} rows, {rejected} of them rejected, and a retry changes {changed}")
        calm.remove()

    def play(self, number: int) -> None:
        """Play one round; if it fails the next rounds are played all the same."""
        round_, failed, kept = Round(self, number), "", Path()
        try:
            round_.play()
        except Failed as error:
            failed, kept = str(error), round_.keep()
        finally:
            round_.end()
        if failed:
            self.failures.append(f"round {number}: {failed}")
            round_.say(f"FAILED: {failed}")
            round_.say(f"again: make chaos SEED={self.seed} ARGS='--only {number}'; kept: {kept}")
        else:
            round_.say("verified")
            round_.remove()

    def table(self, rounds: int, seconds: float) -> str:
        lines = [f"{'fault':22} {'drawn':>6} {'struck':>7} {'starts of a command in such rounds':>36}"]
        lines += [f"{kind:22} {self.drawn[kind]:6} {self.struck[kind]:7} {self.starts[kind]:36}" for kind in KINDS]
        faulted, all_ = self.proxy.injected, self.proxy.count()
        lines.append(
            f"seed {self.seed}: {rounds} rounds in {seconds / 60:.0f} min, {len(self.failures)} failed; {faulted} of {all_} requests to S3 faulted"
        )
        return "\n".join([*lines, *self.failures])


class Round:
    """One output: its faults, its commands, and the check of its rows. It is the `Stage` of the faults (faults.py)."""

    driver: Job

    def __init__(self, chaos: Chaos, number: int) -> None:
        self.chaos, self.number, self.nodes = chaos, number, chaos.nodes
        self.name = f"round{number:04d}" if number >= 0 else "undisturbed"
        self.chance = random.Random(f"{chaos.seed} {number}")
        self.folder = chaos.folder / self.name
        self.folder.mkdir()
        chaos.jobs.folder = self.folder
        self.kinds: list[str] = []
        self.weather = Faults()  # faults of requests to the store, while a command runs
        self._gusts = random.Random(f"{chaos.seed} {number} weather")
        self.disk: Path | None = None
        self._disk_filled = False
        self._armed: list[Fault] = []
        self._striking: set[Fault] = set()
        self._mending: dict[Fault, threading.Thread] = {}
        self._command: tuple[str, ...] = ()
        self._seconds: list[Job] = []
        self._locate(None)

    def say(self, text: str) -> None:
        say(f"{self.name}: {text}")

    def _note(self, kind: str) -> None:
        self.chaos.struck[kind] += 1

    # ------------------------------------------------------------------------------------------------ its faults

    def play(self) -> None:
        chaos, chance = self.chaos, self.chance
        self.kinds = self._draw_kinds()
        self.say(", ".join(self.kinds))
        if self.kinds == [DISK]:
            self._fill_the_disk()
            return
        # Everything is drawn before the first command, so that a repeated round is hit at the same moments.
        faults = [draw(kind, STRIKES[kind], chance, self) for kind in self.kinds if kind in STRIKES]
        kills = {
            kind: [draw(kind, DriverKilled, chance, self, moments)]
            for kind, moments in EDITS.items()
            if kind in self.kinds
        }
        gone = sorted(chance.sample(sorted(chaos.truth), TAKEN_DOWN))
        for kind, share in STORE.items():
            if kind in self.kinds:
                self.weather = Faults(share, list_share=share)
                self._note(kind)
        before = chaos.proxy.injected
        self._under(faults, "fuse", *self.args)
        poison = next((fault for fault in faults if isinstance(fault, PoisonRow) and fault.deaths), None)
        self._compare(chaos.truth, poison)
        expected = chaos.truth
        if poison or "kill during retry" in kills:
            expected = chaos.truth if poison else chaos.retried
            self._under(
                kills.get("kill during retry", []), "fuse", *self.args, *(("retry=engine_crash",) if poison else RETRY)
            )
            self._compare(expected)
        if "kill during takedown" in kills:
            (self.folder / "gone.txt").write_text("\n".join(gone))
            self._under(kills["kill during takedown"], "takedown", *self.output, f"row_ids={self.folder / 'gone.txt'}")
            self._compare({row_id: row for row_id, row in expected.items() if row_id not in gone})
        if injected := chaos.proxy.injected - before:
            self.say(f"{injected} requests to S3 faulted")

    def _draw_kinds(self) -> list[str]:
        """One kind, and up to two others. In as many rounds as there are kinds each comes first once, in an order that the seed gives."""
        kinds = self.chaos.kinds
        deck = random.Random(f"{self.chaos.seed} deck {self.number // len(kinds)}").sample(kinds, len(kinds))
        first = deck[self.number % len(kinds)]
        others = [kind for kind in kinds if kind not in (first, DISK)]
        drawn = [first, *self.chance.sample(others, self.chance.choice((0, 1, 1, 2)))] if first != DISK else [first]
        self.chaos.drawn.update(drawn)
        return drawn

    def _under(self, faults: Sequence[Fault], *command: str) -> None:
        """Repeat the command until it ends well, while these faults wait for their moments."""
        self._armed = list(faults)
        self.until_done(*command)
        for fault in faults:
            if isinstance(fault, PoisonRow) and fault.deaths:
                self.say(f"{fault.kind}: {fault.told}")
            if not fault.struck:
                self.say(f"{fault.kind}: it did not strike, because its moment did not come ({fault.when})")
        self._armed = []

    def _fill_the_disk(self) -> None:
        self.disk = self.folder / "disk"
        self.disk.mkdir()
        kilobytes = self.chance.randint(*DISK_KB)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(self.disk)], check=True)
        self._locate(self.disk)
        self.until_done("fuse", *self.args)
        if not self._disk_filled:
            self.say(f"{DISK}: it did not strike, because {kilobytes} KB were enough")
        self._compare(self.chaos.truth)

    def _grow_the_disk(self) -> None:
        """Enlarge the disk some seconds after the run has logged that it is full: the run waits for space, or is repeated."""
        if not self.disk or self._disk_filled or FULL not in self.driver.said:
            return
        self._disk_filled = True
        self._note(DISK)
        self.say(f"{DISK}: {next(line for line in self.driver.said.splitlines() if FULL in line)[:200]}")
        time.sleep(ABSENT_S)
        subprocess.run(["mount", "-o", "remount,size=64m", str(self.disk)], check=True)

    # ------------------------------------------------------------------------------------------------ its commands

    def until_done(self, *command: str) -> None:
        """Raises Failed where it fails although no fault struck, where it asks for another configuration, and after MAX_STARTS."""
        for _ in range(MAX_STARTS):
            before = self._struck()
            code = self._life(*command)
            if code == 0:
                return
            self.say(f"exit {code}: {'killed' if code < 0 else self.driver.last_words}")
            if code not in (EXIT_FAILED, -signal.SIGKILL) and not (code == EXIT_USAGE and self._seconds):
                raise Failed(
                    f"{command[0]} ended with exit {code}, which does not mean that the same command resumes: {self.driver.last_words}"
                )
            if self._struck() == before and not self._seconds and not self.weather.share:
                raise Failed(f"{command[0]} ended with exit {code}, although no fault struck: {self.driver.last_words}")
        raise Failed(f"{command[0]} was not done after {MAX_STARTS} starts")

    def _life(self, *command: str) -> int:
        """Start the command once, and wait for it and for any second driver; the exit code."""
        self._command, self._seconds = command, []
        self.chaos.proxy.inject(dataclasses.replace(self.weather), seed=self._gusts.randrange(1 << 30))
        self.driver = self.chaos.jobs.start(*command)
        self.chaos.starts.update(self.kinds)
        self.chaos.proxy.watch = self._watch
        while alive := [job for job in (self.driver, *self._seconds) if job.poll() is None]:
            self._mend()
            self._grow_the_disk()
            if late := [job for job in alive if job.age_s > self.chaos.patience_s]:
                raise Failed(f"{late[0].name}, pid {late[0].pid}, does not end: {late[0].last_words}")
            time.sleep(0.1)
        self.chaos.proxy.watch = nobody
        self.chaos.proxy.inject(Faults())
        self._mend()
        self._grow_the_disk()
        for thread in self._mending.values():
            thread.join()
        self.nodes.replenish()
        for second in self._seconds:
            self.say(f"the second driver, pid {second.pid}: exit {second.poll()}: {second.last_words}")
        code = self.driver.poll()
        assert code is not None
        return code

    def second_driver(self, *more: str) -> Job:
        self._seconds.append(second := self.chaos.jobs.start(*self._command, *more))
        return second

    def _watch(self, request: Any, after: bool) -> Callable[[int], bool] | None:
        """Called in the loop of the proxy for each request: how to strike with the fault that is due, or None."""
        path = path_of(request).partition(f"{BUCKET}/{self.name}/")[2]
        waiting = [fault for fault in self._armed if path and fault not in self._striking]
        fault = next((fault for fault in waiting if fault.is_due(request, path, after)), None)
        if fault is None:
            return None
        self._striking.add(fault)  # a fault strikes at one request at a time
        return lambda pid: self._strike(fault, pid, path)

    def _strike(self, fault: Fault, pid: int, path: str) -> bool:
        """Called in a thread of the proxy; True: the request must be dropped."""
        first = not fault.struck
        try:
            drop = fault.strike(pid)
        except (psutil.NoSuchProcess, ProcessLookupError):
            drop = False  # the process has ended meanwhile: the fault waits for the next such request
        if first and fault.struck:
            self._note(fault.kind)
            self.say(f"{fault.kind}, {fault.when} ({path}): {fault.struck}")
        self._striking.discard(fault)
        return drop

    def _mend(self) -> None:
        """Start what follows each fault on a thread of its own: a stopped actor must not wait for a lost node."""
        for fault in self._armed:
            if fault.struck and fault not in self._mending:
                self._mending[fault] = thread = threading.Thread(target=self._follow, args=(fault,), daemon=True)
                thread.start()

    def _follow(self, fault: Fault) -> None:
        fault.mend()
        if fault.mended:
            self.say(f"{fault.kind}: {fault.mended}")

    def _struck(self) -> int:
        return sum(bool(fault.struck) for fault in self._armed) + self._disk_filled

    # ------------------------------------------------------------------------------------------------ its output

    def _locate(self, disk: Path | None) -> None:
        """Put the output on this disk, or into the bucket through the proxy; the input is always in the bucket."""
        through = options(self.chaos.proxy.url)
        self.output: tuple[str, ...] = (f"output.path={disk or f's3://{BUCKET}/{self.name}'}",)
        if not disk:
            self.output += tuple(f"output.storage.{key}={value}" for key, value in through.items())
        storage = tuple(f"input.storage.{key}={value}" for key, value in through.items())
        self.args = (f"input.path=s3://{BUCKET}/in", *storage, *self.output, *ARGS)

    def verified_rows(self) -> Rows:
        """All rows of the output by row id, after `verify` has accepted it. Raises Failed where it does not."""
        verify = self.chaos.jobs.start("verify", *self.output, "deep=true")
        while verify.poll() is None and verify.age_s < self.chaos.patience_s:
            time.sleep(0.1)
        if verify.poll() != 0:
            raise Failed(f"verify deep=true: exit {verify.poll()}: {verify.said[-2000:]}")
        files = [(path.partition("/")[0], data) for path, data in self._objects().items() if path.endswith(".parquet")]
        found = [row | {"in": top} for top, data in files if top in ("data", "rejected") for row in _rows(data)]
        rows = {str(row["row_id"]): row for row in found}
        counts = json.loads(verify.result)["rows"]
        if not len(rows) == len(found) == counts["planned"] - counts["removed"]:
            raise Failed(f"{len(found)} rows of {len(rows)} ids, and the manifest says {counts}")
        return rows

    def _compare(self, want: Rows, poison: PoisonRow | None = None) -> None:
        """Compare every row with `want`. With a poison row, the rows of one pair of captions must be rejected instead."""
        rows = self.verified_rows()
        if lost := want.keys() ^ rows.keys():
            raise Failed(f"{len(lost)} rows are missing or too many, such as {sorted(lost)[:3]}")
        others = [row_id for row_id in want if rows[row_id] != want[row_id]]
        guilty = {
            (rows[row_id]["laion_2b"], rows[row_id]["laion_coco"])
            for row_id in others
            if rows[row_id].get("reason") == "engine_crash"
        }
        innocent = [row_id for row_id in others if rows[row_id].get("reason") != "engine_crash"]
        if innocent or len(guilty) != (poison is not None):
            shown = "\n  ".join(f"is     {rows[row_id]}\n  wanted {want[row_id]}" for row_id in others[:3])
            raise Failed(f"{len(others)} rows are not those of the undisturbed run\n  {shown}")

    def _objects(self) -> dict[str, bytes]:
        """All objects of the output by path, read by boto3 past the proxy, or from the disk."""
        if self.disk:
            return {
                str(path.relative_to(self.disk)): path.read_bytes() for path in self.disk.rglob("*") if path.is_file()
            }
        s3 = client("s3", self.chaos.server)
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{self.name}/")
        keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
        return {key.partition("/")[2]: s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}

    def keep(self) -> Path:
        """Copy the output into the folder of the round's logs; that folder."""
        for path, data in self._objects().items():
            file = self.folder / "output" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        return self.folder

    def end(self) -> None:
        """End the processes and the faults of this round."""
        self.chaos.proxy.watch = nobody
        self.chaos.proxy.inject(Faults())
        self.chaos.jobs.end()
        if self.disk and self.disk.is_mount():
            subprocess.run(["umount", str(self.disk)], check=True)

    def remove(self) -> None:
        for path in self._objects():
            client("s3", self.chaos.server).delete_object(Bucket=BUCKET, Key=f"{self.name}/{path}")
        shutil.rmtree(self.folder)


def nobody(request: Any, after: bool) -> None:
    """A watcher without faults."""


def _rows(data: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.ParquetFile(io.BytesIO(data)).read().to_pylist()
    return rows


def _can_mount(folder: Path) -> bool:
    """Whether this process may mount a small disk."""
    probe = folder / "probe"
    probe.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(probe)], capture_output=True)
    if mounted.returncode == 0:
        subprocess.run(["umount", str(probe)], check=True)
    return mounted.returncode == 0


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def run(seed: int, minutes: float, only: int | None, folder: Path) -> bool:
    """True if no round failed."""
    with moto_server(folder / "moto.log") as server, WatchedProxy(server) as proxy, Nodes(folder / "ray") as nodes:
        chaos = Chaos(seed, folder, nodes, proxy, server)
        try:
            chaos.prepare()
            began, rounds = time.monotonic(), 0
            while rounds == 0 or (only is None and time.monotonic() - began < 60 * minutes):
                chaos.play(rounds if only is None else only)
                rounds += 1
            print(chaos.table(rounds, time.monotonic() - began), flush=True)
        finally:
            chaos.jobs.end()
    return not chaos.failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10, help="no round begins after so many minutes")
    parser.add_argument("--only", type=int, metavar="ROUND", help="play this round alone")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    marked = mark()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    well = False
    try:
        say(f"seed {args.seed}, in {folder}")
        well = run(args.seed, args.minutes, args.only, folder)
    except Failed as failed:
        say(f"FAILED in the undisturbed run: {failed}")
    except KeyboardInterrupt:
        say("interrupted")
    finally:
        if left := end_all(marked):
            say(f"{left} processes had to be ended by pid")
        if well:
            shutil.rmtree(folder)
        else:
            say(f"kept: {folder}")
        if cgroup := tight_cgroup():
            cgroup.rmdir()  # it is empty now
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
