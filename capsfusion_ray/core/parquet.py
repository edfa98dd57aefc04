"""Open Parquet files of strangers without running code from them. Every Parquet file that the project reads passes here.

A Parquet file may say, in its footer's `ARROW:schema`, that a column has an Arrow extension type. pyarrow then calls the Python
class that is registered under that name, and some of these unpickle what the file holds: Ray registers
`ray.data.arrow_pickled_object`, whose cells are pickles. So no extension type of a file is ever resolved here: where a footer
names one, the file is read without its `ARROW:schema`, as the plain storage types that Parquet itself knows. Columns of
a type that is harmless as its storage are read so; a column of any other extension type is refused when it is asked for.

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
TAIL_BYTES = 64 << 10  # one read holds the footer of most files
MAX_FOOTER_BYTES = 256 << 20  # 100,000 row groups of 20 columns need 200 MB; a claim above that is damage

# Arrow's own types whose storage says the same: 16 bytes, text, a number of 0 or 1.
HARMLESS_TYPES = frozenset({"arrow.uuid", "arrow.json", "arrow.bool8"})

_SCHEMA_KEY = b"ARROW:schema"
_EXTENSION_KEY = b"ARROW:extension:name"
# A key that pyarrow does not know, of the same length: a footer keeps its offsets when the one stands for the other.
_UNKNOWN_SCHEMA_KEY = b"ARROW_schema"
_UNKNOWN_EXTENSION_KEY = b"ARROW_extension_name"
# Thrift's compact form of the entry: the key's text, then field 2 of type binary, its length (a varint), its bytes.
_SCHEMA_ENTRY = re.compile(re.escape(_SCHEMA_KEY) + rb"\x18([\x80-\xff]{0,4}[\x00-\x7f])", re.DOTALL)


class ForeignType(SourceError, ValueError):
    """A column has an extension type that is not read. A ValueError, too: a reader of shards counts it as damage of that shard."""


@dataclass(frozen=True)
class Footer:
    """What a file says of itself. `metadata` resolves no extension type; `refused`: column -> the extension type that bars it."""

    metadata: pq.FileMetaData
    refused: Mapping[str, str]

    @property
    def schema(self) -> pa.Schema:
        """Columns and types as they are read, with the file's own key-value metadata."""
        return self.metadata.schema.to_arrow_schema()

    def check(self, columns: Sequence[str] | None, where: str) -> None:
        """Raises ForeignType where one of `columns` (None: any column) may not be read; `where` names the file."""
        for name, kind in self.refused.items():
            if columns is None or name in columns:
                raise ForeignType(f"{where}: {foreign_type(name, kind)}" if where else foreign_type(name, kind))


def foreign_type(column: str, kind: str) -> str:
    """What is said of a column that is not read."""
    return (
        f"column {column!r} has the Arrow extension type {kind!r}, which may run code and is not read; "
        "write the column as plain text, numbers or lists"
    )


def read_footer(source: Any) -> Footer:
    """The footer of an open Parquet file: `source` has size(), seek() and read(), or is a Python file.

    Raises ValueError or pa.ArrowInvalid for what is no Parquet file.
    """
    data = _footer_bytes(source)
    encoded = _arrow_schema_entry(data)
    if encoded is not None and (schema := _decoded(encoded)) is not None and _EXTENSION_KEY not in schema:
        return Footer(_parsed(data), {})
    metadata = _parsed(data.replace(_SCHEMA_KEY, _UNKNOWN_SCHEMA_KEY))
    refused = {}
    for entry in {value for key, value in (metadata.metadata or {}).items() if key == _UNKNOWN_SCHEMA_KEY}:
        refused = _foreign_columns(entry)
    return Footer(metadata, refused)


def open_parquet(source: Any, columns: Sequence[str] | None = None, where: str = "", **options: Any) -> pq.ParquetFile:
    """A ParquetFile of which `columns` (None: all) may be read; `where` names it in errors, `options` are ParquetFile's.

    Raises ForeignType where one of them has an extension type that is not read.
    """
    footer = read_footer(source)
    footer.check(columns, where)
    return pq.ParquetFile(source, metadata=footer.metadata, **options)


def read_schema(source: Any, where: str = "") -> pa.Schema:
    """The Arrow schema of a Parquet file, with its metadata. Raises ForeignType where a column has an extension type."""
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
        raise ValueError(f"no Parquet file: {size} bytes")
    source.seek(max(0, size - TAIL_BYTES))
    tail = bytes(source.read())
    if tail[-4:] != MAGIC:
        raise ValueError("no Parquet file: it does not end with PAR1 (cut off, or encrypted)")
    length = int.from_bytes(tail[-8:-4], "little")
    if length > min(size - 12, MAX_FOOTER_BYTES):
        raise ValueError(
            f"its footer claims {length:,} bytes of a file of {size:,}, of which at most {MAX_FOOTER_BYTES:,} are read"
        )
    if length + 8 > len(tail):
        source.seek(size - 8 - length)
        tail = bytes(source.read(length)) + tail[-8:]
    return tail[-8 - length : -8]


def _parsed(footer: bytes) -> pq.FileMetaData:
    return pq.read_metadata(pa.BufferReader(MAGIC + footer + len(footer).to_bytes(4, "little") + MAGIC))


def _arrow_schema_entry(footer: bytes) -> bytes | None:
    """The value of `ARROW:schema`; empty where there is none; None where it stands in any unusual form."""
    if _SCHEMA_KEY not in footer:
        return b""
    found = _SCHEMA_ENTRY.search(footer)
    if found is None or footer.count(_SCHEMA_KEY) != 1:
        return None
    length = sum((byte & 0x7F) << (7 * i) for i, byte in enumerate(found[1]))
    return footer[found.end() : found.end() + length]


def _decoded(encoded: bytes) -> bytes | None:
    """Base64 decoded; None unless every decoder reads the same bytes in it."""
    try:
        data = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        return None
    return data if base64.b64encode(data) == encoded else None


def _foreign_columns(encoded: bytes) -> dict[str, str]:
    """Columns of an `ARROW:schema` that may not be read."""
    data = _decoded(encoded)
    if data is None:
        return {}  # the file is read as Parquet's own types
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
