"""Text files as streams of records, with bounded memory: what JSON, CSV and TSV have in common.

One broken line is one broken row (None in a stream of records): row numbers stay, and the rest of the file is read.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from capsfusion_ray.sources.shard import BATCH_ROWS, DAMAGE, Decoded, Shard, UnreadableRange, damage_of
from capsfusion_ray.storage import Store

Record = dict[str, Any] | None  # None: a line that cannot be parsed

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class TextFormat:
    """A format whose files are read from front to back. They are read once to inspect them, because they state no row count.

    `records` parses a stream; `kind_of` names the type of a value: null, bool, int, float or string.
    """

    name: str  # the marker of broken rows in the column INVALID
    extensions: tuple[str, ...]
    first_byte: bytes
    records: Callable[[pa.NativeFile], Iterator[Record]]
    kind_of: Callable[[Any], str]

    def inspect(self, store: Store, shard: Shard) -> Shard:
        """Reads the whole file."""
        with open_text(store, shard.file, shard.compression) as stream:
            rows, schema = self._scan(stream)
        return replace(shard, rows=rows, row_groups=(rows,), schema=schema)

    def _scan(self, stream: pa.NativeFile) -> tuple[int, pa.Schema]:
        """The number of rows, and the columns with their types."""
        rows = 0
        kinds: dict[str, set[str]] = {}
        for record in self.records(stream):
            rows += 1
            for name, value in (record or {}).items():
                seen = kinds.setdefault(name, set())
                if "string" not in seen:  # a column with one string is a string column
                    seen.add(self.kind_of(value))
        return rows, pa.schema([pa.field(name, _arrow_type(seen)) for name, seen in kinds.items()])

    def decode(
        self, store: Store, shard: Shard, ranges: Sequence[tuple[int, int]], columns: Sequence[str]
    ) -> Iterator[Decoded | UnreadableRange]:
        """See Format.decode. Damage costs all rows after it."""
        at = 0
        try:
            with open_text(store, shard.file, shard.compression) as stream:
                for start, batch in _batches(self.records(stream), ranges):
                    yield self._decoded(start, batch, shard.schema, columns)
                    at = start + len(batch)
        except FileNotFoundError:
            raise
        except DAMAGE as error:
            yield UnreadableRange(at, shard.rows or 0, damage_of(error, store.url(shard.file)))

    def _decoded(self, start: int, batch: list[Record], schema: pa.Schema, columns: Sequence[str]) -> Decoded:
        """Every column in the type that the scan found; a nested value becomes its JSON text."""
        table = pa.table(
            {name: _column([r and r.get(name) for r in batch], schema.field(name).type) for name in columns}
        )
        if not columns:
            table = pa.table({"": pa.nulls(len(batch))})
        broken = pa.array([self.name if r is None else None for r in batch], pa.string()) if None in batch else None
        return Decoded(start, table, broken)


def _batches(records: Iterator[Record], ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, list[Record]]]:
    """(first row, records) of at most BATCH_ROWS records of the ascending `ranges`; the other records are skipped."""
    wanted = iter(ranges)
    current = next(wanted, None)
    start, batch = 0, list[Record]()
    for row, record in enumerate(records):
        while current and row >= current[1]:
            current = next(wanted, None)
        inside = current is not None and row >= current[0]
        if batch and (not inside or len(batch) == BATCH_ROWS):
            yield start, batch
            batch = []
        if current is None:
            return
        if inside:
            start = start if batch else row
            batch.append(record)
    if batch:
        yield start, batch


# ------------------------------------------------------------------------------------------------ bytes -> lines


def open_text(store: Store, file: str, compression: str) -> io.BufferedReader | pa.NativeFile:
    """The decompressed bytes from front to back. Damage is an OSError while reading."""
    raw = store.open_input(file, sequential=True)
    return pa.CompressedInputStream(raw, compression) if compression else raw


def first_byte(stream: pa.NativeFile) -> bytes:
    """The first byte after white space and a byte order mark; empty for an empty file."""
    head = stream.read(CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    return bytes(head[:1])


def lines(stream: pa.NativeFile) -> Iterator[str]:
    """Lines without their "\\n". Bytes that are not UTF-8 become lone surrogates; `_bytes` turns them back."""
    rest, first = b"", True
    while chunk := stream.read(CHUNK_BYTES):
        pieces = (rest + chunk).split(b"\n") if rest else chunk.split(b"\n")
        rest = pieces.pop()
        for piece in pieces:
            yield _line(piece, first)
            first = False
    if rest:
        yield _line(rest, first)


def _line(data: bytes, first: bool) -> str:
    return (data.removeprefix(codecs.BOM_UTF8) if first else data).decode("utf-8", "surrogateescape")


# ------------------------------------------------------------------------------------------------ values -> Arrow


def json_kind(value: object) -> str:
    """The kind of a value that a JSON parser returned. An object or a list is a string: its JSON text."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(2**63) <= value < 2**63 else "string"
    return "float" if isinstance(value, float) else "string"


def _arrow_type(kinds: set[str]) -> pa.DataType:
    kinds = kinds - {"null"}
    if kinds == {"int"}:
        return pa.int64()
    if kinds and kinds <= {"int", "float"}:
        return pa.float64()
    if kinds == {"bool"}:
        return pa.bool_()
    return pa.string() if kinds else pa.null()


def _column(values: list[Any], type: pa.DataType) -> pa.Array:
    if pa.types.is_string(type) or pa.types.is_null(type):
        try:
            return pa.array(values, pa.string())
        except (pa.ArrowException, UnicodeEncodeError, TypeError):
            return pa.array([_bytes(v) for v in values], pa.binary())
    try:
        return pa.array(values, type)
    except (pa.ArrowException, TypeError, OverflowError):
        return pa.array([None if v is None or v == "" else str(v) for v in values], pa.string())


def _bytes(value: Any) -> bytes | None:
    """The bytes of the file: `lines` made lone surrogates of those that are not UTF-8."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a "\\ud800" escape in JSON: a surrogate that is no byte of the file
        return text.encode("utf-8", "surrogatepass")
