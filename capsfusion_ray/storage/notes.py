"""Small records as JSON objects: one encoding and one way to read them. Knows no record in particular."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from capsfusion_ray.storage.store import Store

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def encode_note(record: Mapping[str, Any] | DataclassInstance) -> bytes:
    """A mapping or a dataclass, nested ones included, as one JSON object in UTF-8; tuples become lists."""
    fields = record if isinstance(record, Mapping) else dataclasses.asdict(record)
    return json.dumps(fields).encode()


def decode_note(data: bytes) -> dict[str, Any]:
    """The fields of a record that encode_note wrote. Raises ValueError where the bytes are not one JSON object."""
    fields = json.loads(data)
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON object is expected, and this is {type(fields).__name__}")
    return fields


def read_note(store: Store, path: str) -> dict[str, Any] | None:
    """The fields of the record at `path`; None where there is no such object."""
    found = store.get_with_etag(path)
    return decode_note(found[0]) if found else None


def write_note(store: Store, path: str, record: Mapping[str, Any] | DataclassInstance) -> None:
    """Write or replace the record at `path`."""
    store.put(path, encode_note(record))
