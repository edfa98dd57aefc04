"""CSV and TSV with a header line.

TSV has no fields of several lines, because a stray quote would swallow rows unseen; quotes around a whole field are removed.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator

import pyarrow as pa

from capsfusion_ray.sources.formats.text import Record, TextFormat, json_kind, lines


def _csv_records(stream: pa.NativeFile) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # the default refuses captions above 128 KB
    yield from _keyed(_parsed(csv.reader(line + "\n" for line in lines(stream))))


def _parsed(table: Iterator[list[str]]) -> Iterator[list[str] | None]:
    """The rows of a CSV reader; None for one that cannot be parsed, such as a bare carriage return outside of quotes."""
    while True:
        try:
            yield next(table)
        except StopIteration:
            return
        except csv.Error:
            yield None


def _tsv_records(stream: pa.NativeFile) -> Iterator[Record]:
    yield from _keyed([_unquoted(f) for f in line.rstrip("\r").split("\t")] for line in lines(stream) if line.strip())


def _unquoted(field: str) -> str:
    return field[1:-1].replace('""', '"') if len(field) > 1 and field[0] == field[-1] == '"' else field


def _keyed(table: Iterator[list[str] | None]) -> Iterator[Record]:
    """The rows as records, with the names of the header. Raises ValueError for a header that cannot be used."""
    names = next((fields for fields in table if fields is None or fields), [])
    if names is None:
        raise ValueError("its header cannot be parsed")
    if len(set(names)) < len(names):
        raise ValueError(f"two columns of the same name in the header: {', '.join(names)}")
    for fields in table:
        if fields is None:
            yield None
        elif fields:  # an empty line is no row
            yield dict(zip(names, fields, strict=True)) if len(fields) == len(names) else None


def _kind(value: str) -> str:
    """The kind of a field's text."""
    if not value:
        return "null"
    try:
        if str(int(value)) == value:  # "007" and "1_0" are texts
            return json_kind(int(value))
        return "string"
    except ValueError:
        pass
    try:
        float(value)
    except ValueError:
        return "string"
    return "string" if "_" in value else "float"


CSV = TextFormat("csv", ("csv",), b"", _csv_records, _kind)
TSV = TextFormat("tsv", ("tsv",), b"", _tsv_records, _kind)
