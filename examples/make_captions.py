"""Write the demo shards in `captions/` from `captions_source.jsonl`. Deterministic: the same bytes every time.

    python examples/make_captions.py [folder]

One line of the source is one caption pair: `shard`, `image`, `raw`, `synthetic`, and where they are needed `note` (why
the row is odd), `repeat` (write the raw caption that many times), `encoding` (write it in that encoding, which makes
invalid UTF-8) and `broken` (cut the JSON line in the middle). Width, height, similarity, punsafe and pwatermark are
made up from a hash of the image path, so that editing one caption leaves all other rows as they are.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "captions_source.jsonl"
HOST = "https://images.example.com/"
SIZES = (
    (640, 480),
    (800, 600),
    (1024, 768),
    (1200, 800),
    (600, 600),
    (1000, 1000),
    (236, 354),
    (735, 1102),
    (320, 240),
    (1280, 720),
    (450, 600),
    (500, 333),
    (300, 450),
    (1600, 1067),
)
ROWS_PER_GROUP = 48
TRUNCATED_AT = 0.6  # of the damaged shard's bytes: no footer, so nothing in it can be read


def passthrough(pair: dict[str, Any]) -> dict[str, Any]:
    """Plausible columns of a LAION table for one pair."""
    digest = hashlib.sha256(pair["image"].encode()).digest()
    a, b, c = (int.from_bytes(digest[i : i + 4], "big") / 2**32 for i in (0, 4, 8))
    note = pair.get("note", "")
    width, height = SIZES[digest[12] % len(SIZES)]
    similarity = 0.280 + 0.015 * a if note == "mismatch" else 0.285 + 0.16 * a * a
    punsafe = 0.55 + 0.4 * b if note == "unsafe" else 0.08 * b**6
    pwatermark = 0.82 + 0.17 * c if note == "watermark" else 0.02 + 0.45 * c**3
    if pair["image"].startswith("stock/") and note != "watermark":
        pwatermark += 0.25
    return {
        "WIDTH": width,
        "HEIGHT": height,
        "similarity": round(similarity, 6),
        "punsafe": round(punsafe, 9),
        "pwatermark": round(pwatermark, 6),
    }


def raw_of(pair: dict[str, Any]) -> str | None:
    raw: str | None = pair["raw"]
    return raw * pair["repeat"] if raw is not None and "repeat" in pair else raw


def row_of(pair: dict[str, Any]) -> dict[str, Any]:
    return {
        "image_url": HOST + pair["image"],
        "laion_2b": raw_of(pair),
        "laion_coco": pair["synthetic"],
        **passthrough(pair),
    }


def parquet(pairs: list[dict[str, Any]], size_type: pa.DataType, score_type: pa.DataType) -> bytes:
    """A parquet file whose raw captions are stored as the bytes they are, valid UTF-8 or not."""
    rows = [row_of(pair) for pair in pairs]
    raw = [
        None if row["laion_2b"] is None else row["laion_2b"].encode(pair.get("encoding", "utf-8"))
        for row, pair in zip(rows, pairs, strict=True)
    ]
    columns = {
        "image_url": pa.array([row["image_url"] for row in rows], pa.string()),
        "laion_2b": pa.array(raw, pa.binary()).view(pa.string()),  # no validation, as many writers of parquet
        "laion_coco": pa.array([row["laion_coco"] for row in rows], pa.string()),
    }
    for name in ("WIDTH", "HEIGHT"):
        columns[name] = pa.array([row[name] for row in rows], size_type)
    for name in ("similarity", "punsafe", "pwatermark"):
        columns[name] = pa.array([row[name] for row in rows], score_type)
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd", row_group_size=ROWS_PER_GROUP)
    return sink.getvalue()


def jsonl_gz(pairs: list[dict[str, Any]]) -> bytes:
    lines = []
    for pair in pairs:
        line = json.dumps(row_of(pair), ensure_ascii=False)
        lines.append(line[: len(line) // 2] if pair.get("broken") else line)
    return gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0)


def truncated(pairs: list[dict[str, Any]]) -> bytes:
    data = parquet(pairs, pa.int32(), pa.float64())
    return data[: int(len(data) * TRUNCATED_AT)]


SHARDS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "part-00000.parquet": lambda pairs: parquet(pairs, pa.int64(), pa.float64()),
    "part-00001.parquet": lambda pairs: parquet(pairs, pa.float64(), pa.float32()),  # the types drift, as LAION's do
    "part-00002.jsonl.gz": jsonl_gz,
    "part-00003.parquet": truncated,
}


def main(folder: Path) -> None:
    pairs = [json.loads(line) for line in SOURCE.read_text(encoding="utf-8").splitlines()]
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, write) in enumerate(SHARDS.items()):
        mine = [pair for pair in pairs if pair["shard"] == number]
        data = write(mine)
        (folder / name).write_bytes(data)
        print(f"{name}: {len(mine)} rows, {len(data)} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "captions")
