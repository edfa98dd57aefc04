"""JSON arrays, JSON lines, CSV and TSV as streams of records with bounded memory. Knows no caption roles.

One broken line is one broken row (None in a stream of records): row numbers stay, and the rest of the file is read. TSV
has no multi-line fields (a stray quote would swallow rows unseen); quotes around a whole field are taken off.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from capsfusion_ray.sources.shard import BATCH_ROWS, Decoded
from capsfusion_ray.storage import Store

Record = dict[str, Any] | None  # None: a line that cannot be parsed

CHUNK_BYTES = 1 << 20
MAX_ELEMENT_BYTES = 64 << 20  # one object of a JSON array: beyond this the array is broken, not large


def open_text(store: Store, file: str, compression: str) -> io.BufferedReader | pa.NativeFile:
    """The decompressed bytes, front to back. Damage shows as OSError while reading."""
    raw = store.open_input(file, sequential=True)
    return pa.CompressedInputStream(raw, compression) if compression else raw


def first_byte(stream: pa.NativeFile) -> bytes:
    """The first byte that is neither white space nor a byte order mark; empty for an empty file."""
    head = stream.read(CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    return bytes(head[:1])


def records(stream: pa.NativeFile, format: str) -> Iterator[Record]:
    """The records of a "json" (array), "jsonl", "csv" or "tsv" stream, in order."""
    if format == "json":
        return _array(stream)
    if format == "jsonl":
        return _json_lines(stream)
    return _csv(stream) if format == "csv" else _tsv(stream)


def scan(stream: pa.NativeFile, format: str) -> tuple[int, pa.Schema]:
    """Rows and columns with types, by reading it all: these formats tell neither in advance."""
    rows = 0
    kinds: dict[str, set[str]] = {}
    kind_of = _json_kind if format.startswith("json") else _csv_kind
    for record in records(stream, format):
        rows += 1
        for name, value in (record or {}).items():
            seen = kinds.setdefault(name, set())
            if "string" not in seen:  # nothing widens a string
                seen.add(kind_of(value))
    return rows, pa.schema([pa.field(name, _arrow_type(seen)) for name, seen in kinds.items()])


def decode(
    stream: pa.NativeFile, format: str, schema: pa.Schema, columns: Sequence[str], ranges: Sequence[tuple[int, int]]
) -> Iterator[Decoded]:
    """Batches that cover the rows of `ranges` (ascending), in one pass; records outside are skipped unbuilt."""
    wanted = iter(ranges)
    span = next(wanted, None)
    start, batch = 0, list[Record]()
    for row, record in enumerate(records(stream, format)):
        while span and row >= span[1]:
            span = next(wanted, None)
        inside = span is not None and row >= span[0]
        if batch and (not inside or len(batch) == BATCH_ROWS):
            yield _decoded(start, batch, format, schema, columns)
            batch = []
        if span is None:
            return
        if inside:
            start = start if batch else row
            batch.append(record)
    if batch:
        yield _decoded(start, batch, format, schema, columns)


# ------------------------------------------------------------------------------------------------ bytes -> records


def _lines(stream: pa.NativeFile) -> Iterator[str]:
    """Lines without their "\\n". Bytes that are not UTF-8 come as lone surrogates, and find their way back in `_text`."""
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


def _json_lines(stream: pa.NativeFile) -> Iterator[Record]:
    for line in _lines(stream):
        if not line or line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        yield value if isinstance(value, dict) else None


def _array(stream: pa.NativeFile) -> Iterator[Record]:
    decoder, to_text = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    text, at, row, chunk_bytes, ended, opened = "", 0, 0, CHUNK_BYTES, False, False
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at < len(text) and not opened:
            if text[at] != "[":
                raise ValueError("not a JSON array: it does not start with '['")
            opened, at = True, at + 1
            continue
        if at < len(text) and text[at] == "]":
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            if ended or len(text) - at > MAX_ELEMENT_BYTES:
                raise ValueError(f"the JSON array breaks off or is damaged after {row} rows: {error}") from None
            more = stream.read(chunk_bytes)
            chunk_bytes = chunk_bytes * 2 if at == 0 else CHUNK_BYTES  # no progress: a larger bite, not one try a chunk
            text, at, ended = text[at:] + to_text.decode(more, not more), 0, not more
            continue
        yield value if isinstance(value, dict) else None
        row += 1


def _csv(stream: pa.NativeFile) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # the default refuses captions above 128 KB
    yield from _keyed(_parsed(csv.reader(line + "\n" for line in _lines(stream))))


def _parsed(table: Iterator[list[str]]) -> Iterator[list[str] | None]:
    """The reader's rows; None for one that breaks the format, such as a bare carriage return outside of quotes."""
    while True:
        try:
            yield next(table)
        except StopIteration:
            return
        except csv.Error:
            yield None


def _tsv(stream: pa.NativeFile) -> Iterator[Record]:
    yield from _keyed([_unquoted(f) for f in line.rstrip("\r").split("\t")] for line in _lines(stream) if line.strip())


def _unquoted(field: str) -> str:
    return field[1:-1].replace('""', '"') if len(field) > 1 and field[0] == field[-1] == '"' else field


def _keyed(table: Iterator[list[str] | None]) -> Iterator[Record]:
    names = next((fields for fields in table if fields is None or fields), [])
    if names is None:
        raise ValueError("its header breaks the format")
    if len(set(names)) < len(names):
        raise ValueError(f"two columns of the same name in the header: {', '.join(names)}")
    for fields in table:
        if fields is None:
            yield None
        elif fields:  # an empty line is no row
            yield dict(zip(names, fields, strict=True)) if len(fields) == len(names) else None


# ------------------------------------------------------------------------------------------------ records -> Arrow


def _json_kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(2**63) <= value < 2**63 else "string"
    return "float" if isinstance(value, float) else "string"


def _csv_kind(value: str) -> str:
    if not value:
        return "null"
    try:
        if str(int(value)) == value:  # "007" and "1_0" are names, not numbers
            return _json_kind(int(value))
        return "string"
    except ValueError:
        pass
    try:
        float(value)
    except ValueError:
        return "string"
    return "string" if "_" in value else "float"


def _arrow_type(kinds: set[str]) -> pa.DataType:
    kinds = kinds - {"null"}
    if kinds == {"int"}:
        return pa.int64()
    if kinds and kinds <= {"int", "float"}:
        return pa.float64()
    if kinds == {"bool"}:
        return pa.bool_()
    return pa.string() if kinds else pa.null()


def _decoded(start: int, batch: list[Record], format: str, schema: pa.Schema, columns: Sequence[str]) -> Decoded:
    """Every column in the type that the scan found; a nested value becomes its JSON text."""
    table = pa.table({name: _column([r and r.get(name) for r in batch], schema.field(name).type) for name in columns})
    if not columns:
        table = pa.table({"": pa.nulls(len(batch))})
    name = "json" if format.startswith("json") else format
    broken = pa.array([name if r is None else None for r in batch], pa.string()) if None in batch else None
    return Decoded(start, table, broken)


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
    """The bytes as the file has them: `_lines` made lone surrogates of those that are not UTF-8."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a "\\ud800" escape: a surrogate that never was a byte
        return text.encode("utf-8", "surrogatepass")
