"""Measure rows per second and peak memory of the fuse job with engine.kind=echo, and of a bare pyarrow loop over its rows.

    python benchmarks/bench_pipeline.py [--rows 1e6,1e7] [--work DIR] [--actors 1] [--json FILE] [--keep] [fuse settings, key=value]

For each size a synthetic corpus is made (make_corpus.py), read and written once by a bare loop (the columns that the job uses,
zstd, a batch at a time), and fused by `python jobs/fuse.py`, as a user would, while processes.py samples the memory and the CPU
seconds of its process tree. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

import make_corpus
from processes import ROOT, end_with_children, figures, job_env, tell, watched

SHARD_ROWS = 200_000  # on average
COLUMNS = (
    "URL",
    "TEXT",
    "top_caption",
    "WIDTH",
    "HEIGHT",
    "similarity",
    "hash",
    "pwatermark",
    "punsafe",
)  # what preset laion_coco reads
PIPELINE_BEGINS = "units to fuse"  # words of the job's log: survey, Ray's start and the plan are done
BARE = """
import sys, pyarrow.dataset as ds, pyarrow.parquet as pq
source, target, *columns = sys.argv[1:]
rows, writer = 0, None
for fragment in ds.dataset(source).get_fragments():
    for batch in pq.ParquetFile(fragment.path).iter_batches(16_384, columns=columns):
        writer = writer or pq.ParquetWriter(target, batch.schema, compression="zstd")
        rows += batch.num_rows
        writer.write_batch(batch.cast(writer.schema))
writer.close()
print(rows)
"""


def bare_loop(corpus: Path, work: Path, timeout_s: float) -> dict[str, object]:
    began = time.monotonic()
    command = [sys.executable, "-c", BARE, str(corpus), str(work / "bare.parquet"), *COLUMNS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with watched(process, timeout_s) as watch:
        out, _ = process.communicate()
    seconds = time.monotonic() - began
    (work / "bare.parquet").unlink(missing_ok=True)
    if process.returncode:
        raise SystemExit(f"the bare loop ended with exit code {process.returncode}")
    return figures("bare loop", int(out), seconds, watch)


def fuse(corpus: Path, output: Path, actors: int, settings: list[str], timeout_s: float) -> dict[str, object]:
    command = [
        sys.executable,
        "jobs/fuse.py",
        "source.preset=laion_coco",
        f"input.path={corpus}",
        f"output.path={output}",
    ]
    command += ["engine.kind=echo", "cluster.gpus_per_actor=0", f"cluster.max_actors={actors}", *settings]
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=job_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    assert process.stderr
    seen: dict[str, float] = {}
    log: list[str] = []
    listener = threading.Thread(target=follow, args=(process.stderr, began, seen, log), daemon=True)
    with watched(process, timeout_s) as watch:
        listener.start()
        out = process.stdout.read()
        process.wait()
        listener.join()
    seconds = time.monotonic() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with exit code {process.returncode}:\n{''.join(log[-40:])}")
    totals = json.loads(out.splitlines()[-1])
    # From the first actor's start to the end of compaction: what grows with the rows.
    steady = seconds - seen.get("pipeline", 0.0)
    stages = {"ray_and_plan_s": round(seen.get("pipeline", 0.0), 1), "pipeline_and_compaction_s": round(steady, 1)}
    found = figures("fuse, echo", totals["rows"]["planned"], seconds, watch)
    return found | {
        "stages": stages,
        "rows_per_s_without_start": round(totals["rows"]["planned"] / steady),
        "outcome": totals["rows"],
    }


def follow(stream: IO[str], began: float, seen: dict[str, float], log: list[str]) -> None:
    for line in stream:
        log.append(line)
        sys.stderr.write(line)
        if PIPELINE_BEGINS in line:
            seen.setdefault("pipeline", time.monotonic() - began)


def table(results: list[dict[str, object]]) -> str:
    columns = ("driver", "driver_private", "workers", "workers_private", "largest_worker_private", "ray")
    head = (
        f"{'':12} {'rows':>11} {'seconds':>8} {'rows/s':>9}"
        + "".join(f" {name.replace('_', ' '):>24}" for name in columns)
        + "   (peak MB)"
    )
    lines = [head]
    for found in results:
        peaks = found["peak_mb"]
        assert isinstance(peaks, dict)
        figures_ = f"{found['what']:12} {found['rows']:>11,} {found['seconds']:>8} {found['rows_per_s']:>9,}"
        lines.append(figures_ + "".join(f" {peaks.get(name, 0):>24,}" for name in columns))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1e6,1e7", help="sizes, separated by commas")
    parser.add_argument(
        "--work", type=Path, help="a folder for corpus and output, emptied per size; default: a temporary one"
    )
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--keep", action="store_true", help="leave corpus and output in --work")
    parser.add_argument("--timeout-s", type=float, default=24 * 3600.0, help="of one run")
    parser.add_argument("settings", nargs="*", help="passed to capsfusion fuse, e.g. unit.rows=20000")
    options = parser.parse_args()
    end_with_children()
    work = options.work or Path(tempfile.mkdtemp(prefix="bench_pipeline_"))
    results: list[dict[str, object]] = []
    for rows in (int(float(size)) for size in options.rows.split(",")):
        folder = work / str(rows)
        shutil.rmtree(folder, ignore_errors=True)
        made = make_corpus.make(folder / "corpus", rows, max(rows // SHARD_ROWS, min(rows, 4)), options.seed)
        print(f"made {rows:,} rows in {made['seconds']} s", file=sys.stderr)
        results.append(bare_loop(folder / "corpus", folder, options.timeout_s))
        results.append(fuse(folder / "corpus", folder / "output", options.actors, options.settings, options.timeout_s))
        if not options.keep:
            shutil.rmtree(folder)
    print(table(results))
    found = {"cpus": os.cpu_count(), "settings": options.settings, "actors": options.actors, "results": results}
    tell(found, options.json)


if __name__ == "__main__":
    main()
