"""Compare the fuse job with plain Ray Data with the same gates, and with a bare pyarrow loop, on the same rows in turn.

    python benchmarks/compare_ray_data.py [--rows 1e6] [--actors 1] [--work DIR] [--json FILE] [fuse settings, key=value]

    bare loop          read, the job's columns, write; no engine, no gates (bench_pipeline.py)
    plain              Ray Data, the engine and the gates in fused tasks (plain_ray_data.py)
    plain, checkpoint  the same with Ray's own CheckpointConfig
    plain, actors      the same with the engine in an actor pool, as one that holds a GPU must be
    ours               jobs/fuse.py; units as they are cut for a GPU of 90 captions/s

`pipeline_s` leaves out Ray's start, and of ours the survey and the plan; compaction, manifest and report are in it. The bar:
ours takes at most 1.5 times plain. Seconds on a shared machine measure the neighbours too, so the ratio is given of CPU
seconds of the whole process tree as well. The corpus has no damaged shard: plain Ray Data ends at the first. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_pipeline
import make_corpus
from processes import ROOT, end_with_children, figures, job_env, tell, watched

BAR = 1.5
UNIT = "unit.captions_per_s=90"  # plan.py's guess for LLaMA-2-13B on one GPU


def plain(what: str, corpus: Path, folder: Path, options: list[str], rows: int, timeout_s: float) -> dict[str, Any]:
    """plain_ray_data.py as a process of its own."""
    output = folder / "plain"
    command = [sys.executable, "benchmarks/plain_ray_data.py", str(corpus), str(output), *options]
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=job_env(), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with watched(process, timeout_s) as watch:
        out, _ = process.communicate()
    seconds = time.monotonic() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with exit code {process.returncode}")
    found: dict[str, Any] = figures(what, rows, seconds, watch) | json.loads(out.splitlines()[-1])
    found |= size_of([output])
    shutil.rmtree(output)
    return found


def ours(corpus: Path, folder: Path, actors: int, settings: list[str], timeout_s: float) -> dict[str, Any]:
    found: dict[str, Any] = bench_pipeline.fuse(corpus, folder / "ours", actors, [UNIT, *settings], timeout_s)
    found |= {"what": "ours", "pipeline_s": found["stages"]["pipeline_and_compaction_s"]}
    return found | size_of([folder / "ours" / "data", folder / "ours" / "rejected"])


def size_of(folders: list[Path]) -> dict[str, int]:
    files = [file for folder in folders for file in folder.rglob("*.parquet")]
    return {"files": len(files), "output_mb": round(sum(file.stat().st_size for file in files) / 1e6)}


def ratios(ours: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Ours over each other one: below 1 we are faster, or cheaper."""
    return {
        other["what"]: {
            "pipeline": round(ours["pipeline_s"] / other["pipeline_s"], 2),
            "cpu": round(ours["cpu_s"] / other["cpu_s"], 2),
        }
        for other in others
        if other["cpu_s"]  # 0: over before the first sample
    }


def table(results: list[dict[str, Any]], against: dict[str, dict[str, float]]) -> str:
    lines = [
        f"{'':18} {'pipeline s':>10} {'rows/s':>9} {'CPU s':>8} {'rows/CPU s':>10} {'files':>6} {'MB':>6}   ours/it: time  CPU"
    ]
    for found in results:
        ratio = against.get(found["what"])
        speed = round(found["rows"] / found["pipeline_s"])
        line = f"{found['what']:18} {found['pipeline_s']:>10.1f} {speed:>9,} {found['cpu_s']:>8.1f} {found['rows_per_cpu_s']:>10,}"
        line += f" {found.get('files', 1):>6,} {found.get('output_mb', 0):>6,}"
        lines.append(line + (f" {ratio['pipeline']:>15.2f} {ratio['cpu']:>5.2f}" if ratio else ""))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=lambda text: int(float(text)), default=1_000_000)
    parser.add_argument("--actors", type=int, default=1, help="of ours, and of plain's engine in actors")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, help="a folder for corpus and outputs, emptied; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--timeout-s", type=float, default=24 * 3600.0, help="of one run")
    parser.add_argument("settings", nargs="*", help="passed to capsfusion fuse")
    options = parser.parse_args()
    end_with_children()
    rows, timeout_s = options.rows, options.timeout_s
    folder = (options.work or Path(tempfile.mkdtemp(prefix="compare_ray_data_"))) / "compare"
    shutil.rmtree(folder, ignore_errors=True)
    corpus = folder / "corpus"
    try:
        make_corpus.make(corpus, rows, max(rows // bench_pipeline.SHARD_ROWS, min(rows, 4)), options.seed)
        bare: dict[str, Any] = bench_pipeline.bare_loop(corpus, folder, timeout_s)
        results = [bare | {"pipeline_s": bare["seconds"]}]
        checkpoint, actors = ["--checkpoint", str(folder / "checkpoint")], ["--actors", str(options.actors)]
        for what, more in (("plain", []), ("plain, checkpoint", checkpoint), ("plain, actors", actors)):
            results.append(plain(what, corpus, folder, more, rows, timeout_s))
        results.append(ours(corpus, folder, options.actors, options.settings, timeout_s))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    against = ratios(results[-1], results[:-1])
    print(table(results, against))
    found = {
        "cpus": os.cpu_count(),
        "rows": rows,
        "actors": options.actors,
        "settings": options.settings,
        "ours_over": against,
        "bar": BAR,
        "within_bar": against["plain"]["pipeline"] <= BAR,
        "results": results,
    }
    tell(found, options.json)


if __name__ == "__main__":
    main()
