"""JSON lines: one object per line. Empty lines are no rows."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pyarrow as pa

from capsfusion_ray.sources.formats.text import Record, TextFormat, json_kind, lines


def _records(stream: pa.NativeFile) -> Iterator[Record]:
    for line in lines(stream):
        if not line or line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        yield value if isinstance(value, dict) else None


JSON_LINES = TextFormat("json", ("jsonl", "ndjson"), b"{", _records, json_kind)
