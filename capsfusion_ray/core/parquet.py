"""Open Parquet files without running code from them. Every Parquet file that the project reads is opened here.

A Parquet file can declare, in `ARROW:schema` of its footer, that a column has an Arrow extension type. pyarrow then calls the
Python class that is registered for that type, and some of these classes unpickle bytes of the file: Ray registers
`ray.data.arrow_pickled_object`, whose cells are pickles. So this module resolves no extension type of a file: where a footer
has one, the file is read without its `ARROW:schema`, as the plain storage types that Parquet itself knows. Columns of a type in
HARMLESS_TYPES are read as their storage type. A column of any other extension type is refused when it is asked for.

Knows bytes and types; no store, no captions.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capsfusion_ray.errors import SourceError

MAGIC = b"PAR1"
TAIL_BYTES = 64 << 10  # read first: it contains the footer of most files
MAX_FOOTER_BYTES = 256 << 20  # 100,000 row groups of 20 columns need 200 MB; a larger length is damage

# Arrow's own types that lose nothing as their storage type: 16 bytes, text, a number of 0 or 1.
HARMLESS_TYPES = frozenset({"arrow.uuid", "arrow.json", "arrow.bool8"})

_SCHEMA_KEY = b"ARROW:schema"
_EXTENSION_KEY = b"ARROW:extension:name"
# Replacements of the same length, which pyarrow does not know: with them in their place a footer keeps its offsets.
_UNKNOWN_SCHEMA_KEY = b"ARROW_schema"
_UNKNOWN_EXTENSION_KEY = b"ARROW_extension_name"
# Thrift's compact form of the entry: the key's text, then field 2 of type binary, its length (a varint), its bytes.
_SCHEMA_ENTRY = re.compile(re.escape(_SCHEMA_KEY) + rb"\x18([\x80-\xff]{0,4}[\x00-\x7f])", re.DOTALL)


class ForeignType(SourceError, ValueError):
    """A column has an extension type that is not read. It is also a ValueError: a reader of shards treats it as damage of the shard."""


@dataclass(frozen=True)
class Footer:
    """The metadata of a file, without any extension type. `refused`: column -> the extension type for which it is not read."""

    metadata: pq.FileMetaData
    refused: Mapping[str, str]

    @property
    def schema(self) -> pa.Schema:
        """Columns and types as they are read, with the key-value metadata of the file."""
        return self.metadata.schema.to_arrow_schema()

    def check(self, columns: Sequence[str] | None, where: str) -> None:
        """Raises ForeignType where one of `columns` (None: all columns) must not be read. `where`: the file, for the message."""
        for name, kind in self.refused.items():
            if columns is None or name in columns:
                raise ForeignType(f"{where}: {foreign_type(name, kind)}" if where else foreign_type(name, kind))


def foreign_type(column: str, kind: str) -> str:
    """The message for a column that is not read."""
    return (
        f"column {column!r} has the Arrow extension type {kind!r}, which may run code and is not read; "
        "write the column as plain text, numbers or lists"
    )


def read_footer(source: Any) -> Footer:
    """The footer of an open Parquet file. `source`: a Python file, or an object with seek(), tell() and read().

    Raises ValueError or pa.ArrowInvalid where it is no Parquet file.
    """
    data = _footer_bytes(source)
    encoded = _arrow_schema_entry(data)
    if encoded is not None and (schema := _decoded(encoded)) is not None and _EXTENSION_KEY not in schema:
        return Footer(_parsed(data), {})
    metadata = _parsed(data.replace(_SCHEMA_KEY, _UNKNOWN_SCHEMA_KEY))
    entry = (metadata.metadata or {}).get(_UNKNOWN_SCHEMA_KEY)
    return Footer(metadata, _foreign_columns(entry) if entry else {})


def open_parquet(source: Any, columns: Sequence[str] | None = None, where: str = "", **options: Any) -> pq.ParquetFile:
    """A ParquetFile, from which `columns` (None: all) can be read. `where`: the file, for messages; `options`: of ParquetFile.

    Raises ForeignType where one of these columns has an extension type that is not read.
    """
    footer = read_footer(source)
    footer.check(columns, where)
    return pq.ParquetFile(source, metadata=footer.metadata, **options)


def read_schema(source: Any, where: str = "") -> pa.Schema:
    """The Arrow schema of a Parquet file, with its metadata. Raises ForeignType where a column has an extension type that is not read."""
    footer = read_footer(source)
    footer.check(None, where)
    return footer.schema


def read_ipc_schema(data: bytes) -> pa.Schema:
    """A schema in Arrow's IPC form. Raises ForeignType where it names an extension type that is not harmless."""
    schema, refused = _plain_schema(data)
    for name, kind in refused.items():
        raise ForeignType(foreign_type(name, kind))
    return schema


# ------------------------------------------------------------------------------------------------ bytes of a footer


def _footer_bytes(source: Any) -> bytes:
    """The Thrift bytes between the last column chunk and the footer's length."""
    size = source.seek(0, 2)
    size = source.tell() if size is None else size
    if size < 12:
        raise ValueError(f"no Parquet file: it has {size} bytes, fewer than the smallest Parquet file")
    source.seek(max(0, size - TAIL_BYTES))
    tail = bytes(source.read())
    if tail[-4:] != MAGIC:
        raise ValueError("no Parquet file: it does not end with PAR1 (cut off, or encrypted)")
    length = int.from_bytes(tail[-8:-4], "little")
    if length > min(size - 12, MAX_FOOTER_BYTES):
        raise ValueError(
            f"its footer claims to have {length:,} bytes, in a file of {size:,} bytes; at most {MAX_FOOTER_BYTES:,} are read"
        )
    if length + 8 > len(tail):
        source.seek(size - 8 - length)
        tail = bytes(source.read(length)) + tail[-8:]
    return tail[-8 - length : -8]


def _parsed(footer: bytes) -> pq.FileMetaData:
    return pq.read_metadata(pa.BufferReader(MAGIC + footer + len(footer).to_bytes(4, "little") + MAGIC))


def _arrow_schema_entry(footer: bytes) -> bytes | None:
    """The value of `ARROW:schema`; empty where there is none; None where it is encoded in an unusual way."""
    if _SCHEMA_KEY not in footer:
        return b""
    found = _SCHEMA_ENTRY.search(footer)
    if found is None or footer.count(_SCHEMA_KEY) != 1:
        return None
    length = sum((byte & 0x7F) << (7 * i) for i, byte in enumerate(found[1]))
    return footer[found.end() : found.end() + length]


def _decoded(encoded: bytes) -> bytes | None:
    """The decoded Base64 text; None where decoders could disagree about its bytes."""
    try:
        data = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        return None
    return data if base64.b64encode(data) == encoded else None


def _foreign_columns(encoded: bytes) -> dict[str, str]:
    """Column -> extension type, of the columns of an `ARROW:schema` that must not be read."""
    data = _decoded(encoded)
    if data is None:
        return {}  # the file is read as Parquet's own types, so nothing is resolved
    try:
        return _plain_schema(data)[1]
    except (pa.ArrowException, ValueError, OSError):
        return {}


def _plain_schema(data: bytes) -> tuple[pa.Schema, dict[str, str]]:
    """A schema in IPC form as its storage types, and its columns with an extension type that is not harmless."""
    schema = pa.ipc.read_schema(pa.py_buffer(data.replace(_EXTENSION_KEY, _UNKNOWN_EXTENSION_KEY)))
    refused = {}
    for field in schema:
        for kind in _extensions(field):
            if kind not in HARMLESS_TYPES:
                refused[field.name] = kind
    return schema, refused


def _extensions(field: pa.Field) -> Iterator[str]:
    """Names of the extension types of a field and of all fields inside it."""
    if field.metadata and _UNKNOWN_EXTENSION_KEY in field.metadata:
        yield field.metadata[_UNKNOWN_EXTENSION_KEY].decode("utf-8", "replace")
    type_ = field.type
    if pa.types.is_dictionary(type_):
        yield from _extensions(pa.field("", type_.value_type))
    for i in range(type_.num_fields):
        yield from _extensions(type_.field(i))
