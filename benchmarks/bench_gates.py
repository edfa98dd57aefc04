"""Measure rows per second and core of the word alignment and of all gates. The last line is JSON.

    python benchmarks/bench_gates.py [captions.json] [rows]

Without the published captions it makes rows of the same lengths from a word list. It reports CPU time, the best of many
slices, because on a shared machine the mean depends on other processes. `steps_per_s` is a plain dict-filling loop on the same core, so
that two machines can be compared.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from capsfusion_ray.config import GatesConfig
from capsfusion_ray.core.gates import judge_sources, judge_table
from capsfusion_ray.core.word_alignment import align

SLICE = 400  # rows; about 20 ms, so that some slice runs undisturbed

Rows = tuple[list[str], list[str], list[str]]


def published(path: Path, n: int) -> Rows:
    found = json.loads(path.read_text())[:n]
    return tuple([row[key] for row in found] for key in ("laion_2b", "laion_coco", "capsfuion_official"))  # type: ignore[return-value]


def made_up(n: int) -> Rows:
    rng = random.Random(0)
    words = [
        f"{a}{b}{c}"
        for a in ("Por", "ca", "re", "To", "mi")
        for b in ("s", "t", "la", "n")
        for c in ("che", "y", "ing", "s")
    ]
    words += ["a", "the", "of", "on", "in", "with", "and"] * 8 + ["911", "2019", "64GB", "1,000"]
    raw = [" ".join(rng.choices(words, k=11)) for _ in range(n)]
    synthetic = [" ".join(rng.choices(words, k=9)) + "." for _ in range(n)]
    fused = [f"{r} {' '.join(rng.choices(words, k=3))} {s}" for r, s in zip(raw, synthetic, strict=True)]
    return raw, synthetic, fused


def best_rows_per_s(work: Callable[[int, int], object], n: int) -> float:
    best = float("inf")
    for start in range(0, n - SLICE + 1, SLICE):
        begun = time.process_time()
        work(start, start + SLICE)
        best = min(best, time.process_time() - begun)
    return SLICE / best


def main(argv: list[str]) -> None:
    n = int(argv[1]) if len(argv) > 1 else 8000
    raw, synthetic, fused = published(Path(argv[0]), n) if argv else made_up(n)
    n = len(raw)
    gates = GatesConfig()
    # As the run holds them: Arrow in, Python lists for the length of one call.
    table = pa.table({"raw": raw, "synthetic": synthetic, "fused": fused})

    def columns(start: int, stop: int) -> list[list[str]]:
        part = table.slice(start, stop - start)
        return [part[name].to_pylist() for name in ("raw", "synthetic", "fused")]

    def spans(start: int, stop: int) -> None:
        for r, s, f in zip(*columns(start, stop), strict=True):
            align(f, r, s)

    def before(start: int, stop: int) -> None:
        r, s, _ = columns(start, stop)
        for a, b in zip(r, s, strict=True):
            judge_sources(a, b, gates)

    def after(start: int, stop: int) -> None:
        judge_table(*columns(start, stop), gates)

    def steps(start: int, stop: int) -> None:
        filled = {}
        for i in range((stop - start) * 100):
            filled[i & 1023] = i

    after(0, n)  # the lexicon is filled once a process
    out = {
        "rows": n,
        "data": "published" if argv else "made up",
        "align_rows_per_s": round(best_rows_per_s(spans, n)),
        "judge_rows_per_s": round(best_rows_per_s(after, n)),
        "judge_sources_rows_per_s": round(best_rows_per_s(before, n)),
        "steps_per_s": round(best_rows_per_s(steps, n) * 100),
    }
    for key, value in out.items():
        print(f"{key:28} {value}")
    print(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1:])
