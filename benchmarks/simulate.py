"""Compare the estimate of `capsfusion plan` with whole runs of 1, 8 and 64 actors whose engines sleep, with and without kills.

    python benchmarks/simulate.py [--actors 1,8,64] [--captions-per-s 20] [--unit-s 15] [--units 8] [--work DIR] [--json FILE]

It runs the fuse job and the plan job with calibrate=true on a Ray cluster of its own. Only the engine of the workers differs
(sleeping.py). Each actor gets --units units of --unit-s seconds. In the runs with kills an actor's process is killed by SIGKILL
once per PREEMPT_UNITS units that an actor fuses.

    predicted   seconds of jobs/plan.py: rows over the actors' measured speed, and the last units
    simulated   from the mean moment at which an actor got its first unit to the last commit: starting 64 processes on few
                cores takes minutes that no estimate of a run of hours needs to know; `start_s` has them
    throughput  words written between the moment at which all actors had a unit and the last hand-out of one, over the most
                that the slots could have written in that time
    with kills  the same job told how long an actor lives (preempted_every_h) and, of that very run, how long it took from a
                kill to the next actor's first unit (restart_s)

The scheduling cost of a unit is CPU of the driver, of Ray's daemons and of all workers (which read, judge, commit and step), for
every unit committed after all actors had one. The bars: predicted and simulated within 10%, throughput 95%. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import make_corpus
import psutil
from processes import TreeWatch, end_with_children, job_env, last_words, megabytes, said_by, tell, watched_job
from run_120m import Output
from sleeping import JOURNAL, STEP_S

WORDS = 20.0  # of an echoed caption of make_corpus, on average; the calibration tells the true speed
PREEMPT_UNITS = 16  # unit times that an actor lives on average: 20 minutes at 90 s, a poor spot market
LOOK_S = 0.25
START_TIMEOUT_S, TIMEOUT_S = 3600.0, 12 * 3600.0
PREDICTION_BAR, THROUGHPUT_BAR = 0.10, 0.95


@dataclass(frozen=True)
class Setup:
    """How fast the engines are, and how much each gets."""

    captions_per_s: float
    unit_s: float
    units: int  # an actor

    @property
    def slots(self) -> int:
        return max(round(self.captions_per_s * WORDS * STEP_S), 1)

    @property
    def unit_rows(self) -> int:
        return round(self.captions_per_s * self.unit_s)

    def rows(self, actors: int) -> int:
        return actors * self.units * self.unit_rows


@dataclass
class Life:
    """One engine's process, from its journal."""

    notes: list[tuple[float, int, float]] = field(
        default_factory=list
    )  # when, words until then, when prompts came last

    @classmethod
    def read(cls, journal: Path) -> Life:
        lines = (line.split() for line in journal.read_text().splitlines())
        return cls(
            [
                (float(at), int(words), float(submitted))
                for at, words, submitted in (line for line in lines if len(line) == 3)
            ]
        )

    @property
    def began(self) -> float:
        """When its first unit came; infinite if none did."""
        return next((submitted for _, _, submitted in self.notes if submitted), float("inf"))

    def words(self, at: float) -> float:
        """Written until then; a straight line between two notes."""
        for (t0, w0, _), (t1, w1, _) in zip(self.notes, self.notes[1:], strict=False):
            if at < t1:
                return w0 + (w1 - w0) * max(at - t0, 0.0) / (t1 - t0)
        return self.notes[-1][1]


def workers_env(journal: Path | None) -> dict[str, str]:
    """As `ray job submit` hands a job its runtime_env: Ray merges it into whatever ray.init the job makes."""
    variables = {"PYTHONPATH": str(Path(__file__).resolve().parent)} | ({JOURNAL: str(journal)} if journal else {})
    runtime_env = {"worker_process_setup_hook": "sleeping.plug_in", "env_vars": variables}
    return job_env() | {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": runtime_env})}


def settings(setup: Setup, actors: int, corpus: Path, output: Path) -> list[str]:
    return [
        f"input.path={corpus}",
        f"input.limit={setup.rows(actors)}",
        "source.preset=laion_coco",
        f"output.path={output}",
        "engine.kind=echo",
        f"engine.slots={setup.slots}",
        f"unit.rows={setup.unit_rows}",
        "cluster.gpus_per_actor=0",
        f"cluster.min_actors={actors}",
        f"cluster.max_actors={actors}",
    ]


def predict(setup: Setup, actors: int, corpus: Path, folder: Path, *more: str) -> dict[str, Any]:
    """What jobs/plan.py says."""
    command = [sys.executable, "jobs/plan.py", *settings(setup, actors, corpus, folder / "none"), *more]
    return said_by(command, folder / "plan.log", TIMEOUT_S, workers_env(None))


def preempted(setup: Setup, speed: float, restart_s: float) -> tuple[str, ...]:
    """What a user would tell jobs/plan.py of a spot market."""
    life_h = PREEMPT_UNITS * setup.unit_s / 3600
    return f"unit.captions_per_s={speed}", f"preempted_every_h={life_h}", f"restart_s={restart_s}"


class Simulation:
    """One run: the job, its kills, and what its engines noted."""

    def __init__(self, setup: Setup, actors: int, preempted: bool, folder: Path, seed: int) -> None:
        self.setup, self.actors, self.preempted, self.folder = setup, actors, preempted, folder
        self.journals = folder / "journals"
        self.output = Output(folder / "output")
        self.kills: list[float] = []
        self._random = random.Random(seed)
        self._looks: list[
            tuple[float, int, int, dict[str, float]]
        ] = []  # when, units, driver's bytes, CPU seconds by role

    def run(self, corpus: Path) -> dict[str, Any]:
        for folder in (self.journals, self.output.path):
            shutil.rmtree(folder, ignore_errors=True)
        self.journals.mkdir(parents=True)
        command = [sys.executable, "jobs/fuse.py", *settings(self.setup, self.actors, corpus, self.output.path)]
        began = time.monotonic()
        with watched_job(command, self.folder, TIMEOUT_S, workers_env(self.journals)) as (process, watch):
            self._follow(process, watch)
        said = last_words(process, self.folder)
        manifest = json.loads((self.output.path / "manifest.json").read_bytes())
        return self._figures(began, watch, said, manifest["counts"]["output_tokens"])

    def _follow(self, process: subprocess.Popen[str], watch: TreeWatch) -> None:
        interval = PREEMPT_UNITS * self.setup.unit_s / self.actors
        planned, next_kill = 0, float("inf")
        while process.poll() is None:
            time.sleep(LOOK_S)
            now, planned = time.monotonic(), planned or self.output.units
            units = self.output.committed() if planned else 0
            self._looks.append((now, units, watch.now.get("driver", 0), watch.cpu_s))
            if units == planned > 0:
                process.wait()
                break
            standing = [int(journal.name) for journal in self.journals.iterdir()]
            if self.preempted and next_kill == float("inf") and len(standing) >= self.actors:
                next_kill = now + interval / 2
            if now >= next_kill:
                next_kill = now + interval
                alive = sorted(pid for pid in standing if psutil.pid_exists(pid))
                drawn = self._random.randrange(
                    self.actors
                )  # one that is being replaced, or not needed any more, may be drawn
                if drawn < len(alive):
                    psutil.Process(alive[drawn]).kill()
                    self.kills.append(now)

    def _figures(self, began: float, watch: TreeWatch, said: dict[str, Any], words: int) -> dict[str, Any]:
        lives = sorted((Life.read(journal) for journal in self.journals.iterdir()), key=lambda life: life.began)
        first, later = lives[: self.actors], lives[self.actors :]
        stood, handed_out = first[-1].began, max(life.notes[-1][2] for life in lives)
        ended = next(at for at, units, _, _ in self._looks if units == said["units"])
        written = sum(life.words(handed_out) - life.words(stood) for life in lives if life.began < handed_out)
        most = self.actors * self.setup.slots * (handed_out - stood) / STEP_S
        simulated_s = mean(ended - life.began for life in first)
        looks = [look for look in self._looks if stood <= look[0] <= ended]
        units = max(looks[-1][1] - looks[0][1], 1)
        roles = ("driver", "ray", "workers")
        spent = {role: looks[-1][3].get(role, 0.0) - looks[0][3].get(role, 0.0) for role in roles}
        restarts = [life.began - kill for life, kill in zip(later, self.kills, strict=False)]
        return {
            "actors": self.actors,
            "preempted": self.preempted,
            "rows": said["rows"]["planned"],
            "units": said["units"],
            "start_s": round(stood - began, 1),
            "simulated_s": round(simulated_s, 1),
            "ideal_s": round(words * STEP_S / self.setup.slots / self.actors, 1),  # every slot busy from first to last
            "steady_s": round(handed_out - stood, 1),
            "throughput": round(written / most, 4),
            "kills": len(self.kills),
            "restart_s": round(mean(restarts), 1) if restarts else None,
            "words_again": round(sum(life.notes[-1][1] for life in lives) / words - 1, 4),
            "driver_mb": [round(look[2] / 1e6) for look in (looks[0], looks[len(looks) // 2], looks[-1])],
            "cpu_ms_a_unit": {role: round(1000 * seconds / units, 1) for role, seconds in spent.items()},
            "peak_mb": megabytes(watch.peaks),
        }


def compared(found: dict[str, Any], predicted: dict[str, Any], with_kills: float) -> dict[str, Any]:
    """A run beside the plan's word for it."""
    return found | {
        "captions_per_s": predicted["captions_per_s"],
        "predicted_s": predicted["seconds"],
        "predicted_with_kills_s": round(with_kills, 1),
        "off": round(predicted["seconds"] / found["simulated_s"] - 1, 3),
        "off_with_kills": round(with_kills / found["simulated_s"] - 1, 3),
    }


def table(results: list[dict[str, Any]]) -> str:
    columns = [
        "actors",
        "kills",
        "units",
        "start_s",
        "ideal_s",
        "predicted_s",
        "predicted_with_kills_s",
        "simulated_s",
        "off",
    ]
    columns += ["off_with_kills", "throughput"]
    lines = [" ".join(f"{name.replace('_', ' '):>8}" for name in columns) + "   driver MB, CPU ms a unit"]
    for found in results:
        figures = " ".join(f"{found[name]:>{max(len(name), 8)}}" for name in columns)
        lines.append(f"{figures}   {found['driver_mb']} {found['cpu_ms_a_unit']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--actors", default="1,8,64", help="numbers, separated by commas")
    parser.add_argument("--captions-per-s", type=float, default=20.0, help="of one engine, about")
    parser.add_argument("--unit-s", type=float, default=15.0)
    parser.add_argument("--units", type=int, default=8, help="an actor")
    parser.add_argument("--preempted", choices=("both", "yes", "no"), default="both")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, help="a folder for corpus, outputs and logs; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    end_with_children()
    setup = Setup(options.captions_per_s, options.unit_s, options.units)
    folder = (options.work or Path(tempfile.mkdtemp(prefix="simulate_"))).resolve() / "simulate"
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [int(text) for text in options.actors.split(",")]
    corpus = folder / "corpus"
    # More than is needed: a limit takes the same number of rows from each shard, so that units are of one size.
    make_corpus.make(corpus, 3 * setup.rows(max(sizes)), 4, options.seed)
    results: list[dict[str, Any]] = []
    try:
        for actors in sizes:
            predicted = predict(setup, actors, corpus, folder, "calibrate=true")
            for spot in {"both": (False, True), "yes": (True,), "no": (False,)}[options.preempted]:
                found = Simulation(setup, actors, spot, folder, options.seed).run(corpus)
                with_kills = predicted
                if found["restart_s"] is not None:
                    told = preempted(setup, predicted["captions_per_s"], found["restart_s"])
                    with_kills = predict(setup, actors, corpus, folder, *told)
                results.append(compared(found, predicted, with_kills["seconds"]))
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    finally:
        for name in ("corpus", "output", "journals"):
            shutil.rmtree(folder / name, ignore_errors=True)
    print(table(results))
    whole = {
        "cpus": os.cpu_count(),
        "setup": vars(setup) | {"slots": setup.slots, "unit_rows": setup.unit_rows, "step_s": STEP_S},
        "within_10_percent": all(abs(found["off_with_kills"]) <= PREDICTION_BAR for found in results),
        "throughput_95": all(found["throughput"] >= THROUGHPUT_BAR for found in results if not found["preempted"]),
        "results": results,
    }
    tell(whole, options.json)


if __name__ == "__main__":
    main()
