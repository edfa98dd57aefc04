"""Pair two tables whose join is known with `capsfusion pair`: measure time and memory, and check each row.

    python benchmarks/bench_pair.py [--rows 5e6] [--work DIR] [--seed 1] [--keep] [--json FILE] [pair settings, key=value]

Each table has --rows rows with captions and URLs as long as published ones (make_corpus.py), in skewed shards, neither in the
order of its keys nor of the other table. Of a table's rows 2% repeat the key of another (half of them with another caption) and
0.1% have none; a fifth of the keys is in one table alone. The raw table's URLs are http:// with a host in capitals, the
synthetic one's https://: they meet under normalise=url. One column is carried along from each table.

Then the audit is compared with the counts, and every pair of the output with the two captions and columns that its key must
have. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make_corpus
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from processes import end_with_children, figures, last_words, tell, watched_job

SHARD_ROWS = 250_000  # on average
BLOCK_ROWS = 65_536  # a row group
CAPTIONS = 65_536  # different ones; a key's caption ends in the key
DUPLICATE_SHARE, KEYLESS_SHARE, LONELY_SHARE = 0.02, 0.001, 0.2
STRIDES = {"raw": 1_000_003, "synthetic": 7_368_787}  # primes: a row's place is its number times the stride
TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Side:
    """One table. Its rows are numbered 0, 1, ...: first those with keys of their own, then those that repeat, then those without a key.

    Row n stands at place n * stride mod rows. Repeating row n has the key of row n - `own`; the even ones of them have
    another caption than it.
    """

    name: str
    rows: int
    first_key: int

    @property
    def keyless(self) -> int:
        return round(self.rows * KEYLESS_SHARE)

    @property
    def repeating(self) -> int:
        return round(self.rows * DUPLICATE_SHARE)

    @property
    def own(self) -> int:
        return self.rows - self.repeating - self.keyless

    def numbers_at(self, places: np.ndarray) -> np.ndarray:
        back = pow(STRIDES[self.name] % self.rows, -1, self.rows)  # a Python number: no product below overflows 64 bits
        return places * back % self.rows

    def places_of(self, numbers: np.ndarray) -> np.ndarray:
        return numbers * (STRIDES[self.name] % self.rows) % self.rows

    def key_index(self, numbers: np.ndarray) -> np.ndarray:
        """The key, from 0; -1 for none."""
        repeats = numbers >= self.own
        return np.where(numbers >= self.own + self.repeating, -1, np.where(repeats, numbers - self.own, numbers))

    def is_other(self, numbers: np.ndarray) -> np.ndarray:
        """Repeating rows whose caption is another."""
        return (numbers >= self.own) & (numbers < self.own + self.repeating) & (numbers % 2 == 0)

    def winner(self, index: np.ndarray) -> np.ndarray:
        """Of each key (from 0) the row that stands first."""
        rival = np.where(index < self.repeating, index + self.own, index)
        return np.where(self.places_of(rival) < self.places_of(index), rival, index)


@dataclass(frozen=True)
class Tables:
    """Both tables: what they hold, and what their join must give."""

    rows: int
    seed: int

    @property
    def sides(self) -> dict[str, Side]:
        raw = Side("raw", self.rows, 0)
        return {"raw": raw, "synthetic": Side("synthetic", self.rows, round(raw.own * LONELY_SHARE))}

    def captions(self, side: str, keys: np.ndarray, other: np.ndarray) -> pa.Array:
        rng = np.random.default_rng((self.seed, 1))
        pool = dict(zip(self.sides, make_corpus.captions(rng, CAPTIONS), strict=True))[side]
        tail = pa.array(keys).cast(pa.string())
        tail = pc.if_else(pa.array(other), pc.binary_join_element_wise(tail, "again", " "), tail)
        return pc.binary_join_element_wise(pc.fill_null(pool, "").take(pa.array(keys % CAPTIONS)), tail, " ")

    def urls(self, side: str, keys: np.ndarray) -> pa.Array:
        hosts = make_corpus.bank().hosts
        if side == "raw":
            hosts = pc.replace_substring(pc.replace_substring(hosts, "https://", "http://"), ".example", ".Example")
        stem = pa.array(keys).cast(pa.string())
        url = pc.binary_join_element_wise(hosts.take(pa.array(keys % len(hosts))), stem, ".jpg", "")
        return pc.if_else(pa.array(keys < 0), pa.scalar(None, pa.string()), url)

    def block(self, side: Side, places: np.ndarray) -> pa.Table:
        numbers = side.numbers_at(places)
        index = side.key_index(numbers)
        keys = np.where(index < 0, -1, index + side.first_key)
        text = self.captions(side.name, np.maximum(keys, 0), side.is_other(numbers))
        if side.name == "raw":
            return pa.table({"URL": self.urls("raw", keys), "TEXT": text, "WIDTH": pa.array(numbers % 4096)})
        score = pa.array(numbers / 2.0)
        return pa.table({"url": self.urls("synthetic", keys), "top_caption": text, "score": score})

    def write(self, folder: Path) -> int:
        """Both tables, but for shards that are there; their bytes."""
        size = 0
        for side in self.sides.values():
            (folder / side.name).mkdir(parents=True, exist_ok=True)
            at = 0
            for number, rows in enumerate(
                make_corpus.shard_rows(side.rows, max(side.rows // SHARD_ROWS, 2), self.seed)
            ):
                path = folder / side.name / f"{number:05d}.parquet"
                if not path.exists():
                    self.write_shard(side, at, rows, path)
                size += path.stat().st_size
                at += rows
        return size

    def write_shard(self, side: Side, at: int, rows: int, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        writer = None
        for start in range(at, at + rows, BLOCK_ROWS):
            table = self.block(side, np.arange(start, min(start + BLOCK_ROWS, at + rows), dtype=np.int64))
            writer = writer or pq.ParquetWriter(temporary, table.schema, compression="snappy", use_dictionary=False)
            writer.write_table(table)
        assert writer, "a shard has at least one row"
        writer.close()
        os.replace(temporary, path)

    def expected(self) -> dict[str, dict[str, int]]:
        """The audit."""
        raw, synthetic = self.sides.values()
        pairs = raw.own - synthetic.first_key
        counts = {}
        for side in (raw, synthetic):
            repeating = np.arange(side.own, side.own + side.repeating, dtype=np.int64)
            counts[side.name] = {
                "rows": side.rows,
                "matched": pairs,
                "unmatched": side.own - pairs,
                "duplicates": side.repeating,
                "conflicting": int(side.is_other(repeating).sum()),
                "without_key": side.keyless,
                "unusable": 0,
                "unreadable": 0,
            }
        return counts

    def check(self, output: Path) -> dict[str, int]:
        """Every pair of the output against what its key must have. SystemExit at the first file with a wrong one."""
        raw, synthetic = self.sides.values()
        seen = np.zeros(raw.own, bool)
        files = sorted(output.glob("*.parquet"))
        for path in files:
            for batch in pq.ParquetFile(path).iter_batches(BLOCK_ROWS):
                stem = pc.struct_field(pc.extract_regex(batch["image_url"], r"/(?P<key>\d+)\.jpg$"), "key")
                keys = stem.cast(pa.int64()).to_numpy()
                won = {side.name: side.winner(keys - side.first_key) for side in (raw, synthetic)}
                want = {
                    "image_url": self.urls("raw", keys),
                    "laion_2b": self.captions("raw", keys, raw.is_other(won["raw"])),
                    "laion_coco": self.captions("synthetic", keys, synthetic.is_other(won["synthetic"])),
                    "WIDTH": pa.array(won["raw"] % 4096),
                    "score": pa.array(won["synthetic"] / 2.0),
                }
                for name, column in want.items():
                    if not batch[name].equals(column):
                        raise SystemExit(f"{path}: column {name} is not what its keys must have")
                if seen[keys].any() or len(np.unique(keys)) != len(keys):
                    raise SystemExit(f"{path}: a key was paired twice")
                seen[keys] = True
        wanted = np.arange(raw.own) >= synthetic.first_key
        if not (seen == wanted).all():
            raise SystemExit(f"{output}: {int((seen != wanted).sum())} keys are paired that must not be, or are not")
        return {"pairs_checked": int(seen.sum()), "files": len(files)}


def pair(tables: Tables, work: Path, settings: list[str]) -> dict[str, Any]:
    """Run the job, watched; SystemExit unless its audit is the expected one."""
    command = [sys.executable, "jobs/pair.py", f"raw.path={work / 'raw'}", f"synthetic.path={work / 'synthetic'}"]
    command += [
        "raw.passthrough=[WIDTH]",
        "synthetic.passthrough=[score]",
        "normalise=url",
        f"output.path={work / 'output'}",
    ]
    began = time.monotonic()
    with watched_job([*command, *settings], work, TIMEOUT_S) as (process, watch):
        process.wait()
    said, seconds = last_words(process, work), time.monotonic() - began
    found = {side: {name: said[side][name] for name in counts} for side, counts in tables.expected().items()}
    if found != tables.expected():
        raise SystemExit(f"the audit says {found}, and not {tables.expected()}")
    audit = {name: said[name] for name in ("pairs", "raw", "synthetic", "partitions", "largest_bucket")}
    return figures("pair", 2 * tables.rows, seconds, watch) | {"cpu_s_by": watch.cpu_s, "audit": audit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=lambda text: int(float(text)), default=5_000_000, help="of each table")
    parser.add_argument(
        "--work", type=Path, help="a folder for tables and output; shards that are there are not made again"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--keep", action="store_true", help="leave tables and output in --work")
    parser.add_argument("settings", nargs="*", help="passed to capsfusion pair, e.g. partitions=20")
    options = parser.parse_args()
    end_with_children()
    work = (options.work or Path(tempfile.mkdtemp(prefix="bench_pair_"))).resolve()
    tables = Tables(options.rows, options.seed)
    began = time.monotonic()
    size = tables.write(work)
    print(f"made 2 x {options.rows:,} rows in {time.monotonic() - began:.0f} s", file=sys.stderr)
    found = pair(tables, work, options.settings) | tables.check(work / "output")
    output = sum(path.stat().st_size for path in (work / "output").rglob("*") if path.is_file())
    found |= {"tables_mb": round(size / 1e6), "output_mb": round(output / 1e6), "cpus": os.cpu_count()}
    if not options.keep:
        shutil.rmtree(work)
    tell(found | {"settings": options.settings}, options.json)


if __name__ == "__main__":
    main()
