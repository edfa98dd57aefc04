"""Run the whole pipeline around the GPU over 120 million rows: corpus, plan, fuse with two kills, compact, verify, report.

    python benchmarks/run_120m.py --work DIR [--rows 120e6] [--seed 1] [--detach] [--keep] [--json FILE] [key=value …]

It runs the fuse job with engine.kind=echo and default gates. Units are cut as for a GPU of 90 captions/s, because the number
of units is what is tested. At 25% and at 75% of the units the process group of the job is killed by SIGKILL, and the same command
resumes. A second call skips the stages that are done (DIR/state.json). With --detach the run continues in the background, with its log in
DIR/run.log. The corpus has skewed shards, huge row groups and damaged shards (make_corpus.py). Input shards are deleted once
compacted where the disk cannot hold corpus and output together. Corpus and output are removed at the end, unless --keep.
The last line is JSON. For what is measured of memory see processes.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import make_corpus
import psutil
import pyarrow.parquet as pq
import s3_requests
from processes import TreeWatch, end_with_children, last_words, megabytes, said_by, tell, watched_job

SHARD_ROWS = 200_000  # on average
CORPUS_BYTES, OUTPUT_BYTES = 180, 160  # a row; measured at 1M rows, and rounded up
SPARE_BYTES = 2 << 30  # logs, Ray's session, parts that wait for their group
KILLS = (0.25, 0.75)  # of the units
LOOK_S = 0.5
MEMORY_STEPS = 20  # shares of the run at which the driver's memory is noted
TIMEOUT_S = 24 * 3600.0
REAL_ACTORS, REAL_CAPTIONS_PER_S = 64, 90.0  # of the run that the store's requests are extrapolated to
UNIT = f"unit.captions_per_s={REAL_CAPTIONS_PER_S:g}"
DRIVER_BAR_MB, RESUME_BAR_S, CORE_BAR_ROWS_PER_S = 2000, 90.0, 50 * 100.0  # the last: 50 GPUs at 100 captions/s


class Output:
    """An output folder seen from outside, while a job works on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, list[dict[str, Any]]] = {}
        self._compacted: set[str] = set()

    @property
    def units(self) -> int:
        """Planned; 0 before there is a plan."""
        return sum(pq.read_metadata(plan).num_rows for plan in (self.path / "_run").glob("plan-r*.parquet"))

    def committed(self) -> int:
        """Units that are parts, or were compacted."""
        self._look()
        parts = {name.stem for name in (self.path / "_units").glob("*.parquet")}
        self._look()  # anew: a part that was seen may have been compacted in between
        return len(parts | self._compacted)

    def compacted_shards(self) -> set[str]:
        """Paths of the shards of which all units are compacted: a group holds whole shards."""
        self._look()
        return {unit["path"] for units in self._entries.values() for unit in units}

    @property
    def groups(self) -> int:
        return len(self._entries)

    def _look(self) -> None:
        for entry in (self.path / "_run" / "groups").glob("*.json"):
            if entry.name not in self._entries:
                self._entries[entry.name] = json.loads(entry.read_bytes())["units"]
                self._compacted |= {unit["id"] for unit in self._entries[entry.name]}


class Bench:
    """The stages, each done once a work folder."""

    def __init__(self, work: Path, rows: int, seed: int, settings: list[str]) -> None:
        self.work, self.rows, self.seed, self.settings = work, rows, seed, settings
        self.corpus = work / "corpus"
        self.output = Output(work / "output")
        self.shards = max(rows // SHARD_ROWS, min(rows, 20))
        self._state_file = work / "state.json"
        asked = {"rows": rows, "seed": seed, "settings": settings}
        self.state: dict[str, Any] = {"asked": asked, "stages": {}}
        if self._state_file.exists():
            self.state = json.loads(self._state_file.read_text())
            if self.state["asked"] != asked:
                raise SystemExit(f"{work}: holds a run of {self.state['asked']}, not of {asked}; give another --work")
        # What a process that was cut off had not finished stands in no figure but the number of units that it left.
        self.state["processes"] = self.state.get("processes", 0) + 1

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        stages: dict[str, dict[str, Any]] = self.state["stages"]
        return stages

    def save(self) -> None:
        temporary = self._state_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state, indent=1) + "\n")
        os.replace(temporary, self._state_file)

    def run(self) -> None:
        self.save()
        self._stage("disk", self._check_disk)
        self._stage("corpus", self._make_corpus)
        self._stage("plan", lambda: self._job("plan", *self._settings()))
        for number, until in enumerate((*KILLS, None)):
            self._stage(f"fuse {number + 1}", lambda until=until: self._fuse(until))
        self._stage("verify", lambda: self._job("verify", f"output.path={self.output.path}", "deep=true"))
        self._stage("report", lambda: self._job("report", f"output.path={self.output.path}"))

    def _stage(self, name: str, work: Any) -> None:
        if name in self.stages:
            return
        print(f"{time.strftime('%H:%M:%S')} {name} ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        found = work()
        self.stages[name] = {"seconds": round(time.monotonic() - began, 1)} | found
        self.save()
        print(f"{time.strftime('%H:%M:%S')} {name}: {self.stages[name]}", file=sys.stderr, flush=True)

    def _settings(self) -> list[str]:
        paths = [f"input.path={self.corpus}", f"output.path={self.output.path}"]
        fixed = ["source.preset=laion_coco", "engine.kind=echo", "cluster.gpus_per_actor=0", UNIT]
        return [*paths, *fixed, *self.settings]

    def _check_disk(self) -> dict[str, Any]:
        free = shutil.disk_usage(self.work).free
        whole = self.rows * (CORPUS_BYTES + OUTPUT_BYTES) + SPARE_BYTES
        least = round(self.rows * CORPUS_BYTES * 1.1) + SPARE_BYTES  # the output takes less than what it lets go
        if free < least:
            raise SystemExit(
                f"{self.work}: {free / 1e9:.1f} GB free; {self.rows:,} rows need {whole / 1e9:.1f} GB, or "
                f"{least / 1e9:.1f} GB with input shards deleted on the way; free some, give another --work, or fewer --rows"
            )
        return {"free_gb": round(free / 1e9, 1), "needed_gb": round(whole / 1e9, 1), "drop_input": free < whole}

    def _make_corpus(self) -> dict[str, Any]:
        """Shard by shard: one that is there is whole, and is not made again."""
        damage = make_corpus.damage_of(self.shards, max(self.shards // 100, 2), self.seed)
        missing = [n for n in range(self.shards) if not (self.corpus / make_corpus.shard_name(n)).exists()]
        cpus = os.cpu_count() or 1
        make_corpus.make(self.corpus, self.rows, self.shards, self.seed, len(damage), processes=cpus, only=missing)
        shards = {number: self.corpus / make_corpus.shard_name(number) for number in range(self.shards)}
        whole = [path for number, path in shards.items() if damage.get(number) != "cut"]
        return {
            "shards": self.shards,
            "found": self.shards - len(missing),
            "damaged": {shards[number].name: how for number, how in damage.items()},
            "bytes_per_row": round(sum(path.stat().st_size for path in shards.values()) / self.rows, 1),
            "row_groups": sum(pq.read_metadata(path).num_row_groups for path in whole),
        }

    def _job(self, name: str, *settings: str) -> dict[str, Any]:
        """A job that runs to its end; what it said last."""
        return {"said": said_by([sys.executable, f"jobs/{name}.py", *settings], self.work / f"{name}.log", TIMEOUT_S)}

    def _fuse(self, until: float | None) -> dict[str, Any]:
        """The fuse job, until that share of the units is committed, or to its end."""
        before = self.output.committed()
        command = [sys.executable, "jobs/fuse.py", *self._settings()]
        began = time.monotonic()
        with watched_job(command, self.work, TIMEOUT_S) as (process, watch):
            found = self._follow(process, watch, before, until, began)
            tree = [process.pid, *(child.pid for child in _descendants(process.pid))]
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                found |= {"killed_at": round(found["units"] / self.output.units, 3)} | _outlived(tree)
            else:
                found["said"] = last_words(process, self.work)
        cpu_s = {role: round(seconds, 1) for role, seconds in watch.cpu_s.items()}
        return found | {"peak_mb": megabytes(watch.peaks), "cpu_s": cpu_s}

    def _follow(
        self, process: subprocess.Popen[str], watch: TreeWatch, before: int, until: float | None, began: float
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"units_before": before, "units": before, "driver_mb": {}}
        planned, last = 0, None
        while process.poll() is None:
            time.sleep(LOOK_S)
            planned = planned or self.output.units
            units = self.output.committed() if planned else before
            if units > before and "first_commit_s" not in found:
                cpu_s = round(sum(watch.cpu_s.values()), 1)
                found |= {
                    "first_commit_s": round(time.monotonic() - began, 1),
                    "start_cpu_s": cpu_s,
                    "start_units": units - before,
                }
            if units == planned and last is None:
                last = time.monotonic()
            found["units"] = units
            if planned and "driver" in watch.now:
                step = units * MEMORY_STEPS // planned * 100 // MEMORY_STEPS
                # Of its own, and with the pages of the object store that it has read: those grow, and are the store's.
                sizes = [round(watch.now[name] / 1e6) for name in ("driver_private", "driver")]
                found["driver_mb"].setdefault(f"{step}%", sizes)
            if self.stages["disk"]["drop_input"]:
                self._drop_input()
            if until is not None and planned and units >= until * planned:
                break
        else:
            if last is not None:
                found["after_last_commit_s"] = round(time.monotonic() - last, 1)
        return found

    def _drop_input(self) -> None:
        left = sorted(self.corpus.glob("*.parquet"))
        done = self.output.compacted_shards()
        for shard in left[:-1]:  # one must stay: a run without any input is refused
            if shard.name in done:
                shard.unlink()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        children: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
        return children
    except psutil.NoSuchProcess:
        return []


def _outlived(pids: list[int], patience_s: float = 60.0) -> dict[str, Any]:
    """How long the killed driver's Ray took to notice; what is left after a minute is ended by hand."""
    began = time.monotonic()
    left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, left = psutil.wait_procs(left, patience_s)
    for process in left:
        process.kill()
    return {"tree_gone_s": round(time.monotonic() - began, 1), "ended_by_hand": len(left)}


def summary(bench: Bench) -> dict[str, Any]:
    """Figures and bars of a finished run."""
    stages = bench.stages
    runs = [stages[f"fuse {i + 1}"] for i in range(len(KILLS) + 1)]
    plan, corpus, verified = stages["plan"]["said"], stages["corpus"], stages["verify"]["said"]
    planned = runs[-1]["said"]["rows"]["planned"]
    peaks = {name: max(run["peak_mb"].get(name, 0) for run in runs) for name in runs[-1]["peak_mb"]}
    cpu_s = sum(sum(run["cpu_s"].values()) for run in runs)
    fuse_s = sum(run["seconds"] for run in runs)
    # Of the runs that the figures are of: all, unless this bench itself was cut off on the way.
    share = sum(run["units"] - run["units_before"] for run in runs) / plan["units"]
    start_cpu_s, start_units = (sum(run.get(name, 0) for run in runs) for name in ("start_cpu_s", "start_units"))
    without_starts = round(planned * (share - start_units / plan["units"]) / (cpu_s - start_cpu_s))
    hours = planned / (REAL_ACTORS * REAL_CAPTIONS_PER_S) / 3600
    output = Output(bench.output.path)
    output.committed()
    shape = s3_requests.Shape(
        shards=corpus["shards"],
        row_groups=corpus["row_groups"],
        reads=min(plan["units"], corpus["row_groups"]),  # units that share a row group are read together
        units=plan["units"],
        files=verified["files"],
        groups=output.groups,
        hours=hours,
    )
    by_kind = s3_requests.requests(shape)
    resume_s = runs[-1].get("first_commit_s")  # none where so few units were left that the kill came too late
    return {
        "rows": bench.rows,
        "planned": planned,
        "units": plan["units"],
        "cpus": os.cpu_count(),
        "outcome": runs[-1]["said"]["rows"],
        "rejects": runs[-1]["said"]["rejects"],
        "damaged_shards": len(corpus["damaged"]),
        "seconds": {name: stage["seconds"] for name, stage in stages.items()}
        | {"after_last_commit": runs[-1].get("after_last_commit_s")},
        "processes": bench.state["processes"],
        "share_measured": round(share, 4),
        "rows_per_s": round(planned * share / fuse_s),
        "rows_per_cpu_s": round(planned * share / cpu_s),
        "rows_per_cpu_s_without_starts": without_starts,
        "first_commit_s": [run.get("first_commit_s") for run in runs],
        "killed_at": [run.get("killed_at") for run in runs],
        "tree_gone_s": [run.get("tree_gone_s") for run in runs],
        "driver_mb": [run["driver_mb"] for run in runs],
        "peak_mb": peaks,
        "objects": {
            "parts": plan["units"],
            "notes": plan["units"],
            "files": verified["files"],
            "entries": shape.groups,
        },
        "output_bytes_per_row": round(verified["bytes"] / planned, 1),
        "corpus_bytes_per_row": corpus["bytes_per_row"],
        "s3": {"real_hours": round(hours, 2), "requests": by_kind, "usd": round(s3_requests.price(by_kind), 2)},
        "bars": {
            "driver_below_2_gb": peaks["driver"] < DRIVER_BAR_MB,
            "resume_within_90_s": resume_s is not None and resume_s <= RESUME_BAR_S,
            "core_feeds_50_gpus": without_starts >= CORE_BAR_ROWS_PER_S,
        },
        "settings": bench.settings,
    }


def detach(work: Path) -> None:
    """The same command without --detach, in a session of its own."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--detach"]
    with (work / "run.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    print(json.dumps({"pid": process.pid, "log": str(work / "run.log")}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="corpus, output, logs and state go there")
    parser.add_argument("--rows", type=lambda text: int(float(text)), default=120_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--detach", action="store_true", help="run on in the background; the log is DIR/run.log")
    parser.add_argument("--keep", action="store_true", help="leave corpus and output in DIR")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("settings", nargs="*", help="passed to capsfusion fuse")
    options = parser.parse_args()
    end_with_children()
    work = options.work.resolve()  # the jobs run in the repository's folder
    work.mkdir(parents=True, exist_ok=True)
    if options.detach:
        detach(work)
        return
    bench = Bench(work, options.rows, options.seed, options.settings)
    bench.run()
    if "summary" not in bench.state:
        bench.state["summary"] = summary(bench)
        bench.save()
    found = bench.state["summary"]
    if not options.keep:
        shutil.rmtree(bench.corpus, ignore_errors=True)
        shutil.rmtree(bench.output.path, ignore_errors=True)
    tell(found, options.json)


if __name__ == "__main__":
    main()
