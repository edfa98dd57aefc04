"""Choose one frozen schema for all shards, and cast every column to it. Knows types, and no files.

| types seen in the shards | frozen type |
| --- | --- |
| integers of any width | int64 (uint64 among them and no signed one: uint64; mixed: string) |
| any float, with or without integers | float64 |
| strings of any kind, dictionaries of strings | string |
| a string and another scalar; different dates or times | string |
| one and the same type (bool, date, list, ...) | that type |
| lists or structs that differ | refused |
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from capsfusion_ray.config import FilterConfig, SourceConfig
from capsfusion_ray.core.columns import PAIR_FIELDS, RAW, REFERENCE, SYNTHETIC, URL
from capsfusion_ray.core.parquet import foreign_type
from capsfusion_ray.core.types import FilterReason
from capsfusion_ray.errors import SourceError
from capsfusion_ray.sources.presets import FILTER_COLUMNS, ColumnMap, column_map, passthrough_columns
from capsfusion_ray.sources.shard import Shard

LOG = logging.getLogger(__name__)


def frozen_schema(shards: Sequence[Shard], source: SourceConfig, filter: FilterConfig) -> pa.Schema:
    """PAIR_FIELDS, then `reference` if any shard has one, then the passthrough columns, each with one type for all shards.

    Raises SourceError naming the shard for a missing column, a caption that is not text, or types that cannot be combined.
    """
    names, needed = passthrough_columns(source)
    readable = [(shard.path, shard.schema) for shard in shards if shard.schema is not None and shard.rows]
    seen: dict[str, dict[pa.DataType, str]] = {name: {} for name in names}
    reference = False
    for path, schema in readable:
        columns = column_map(source, schema.names, path)
        reference = reference or bool(columns.reference)
        for name in (columns.raw, columns.synthetic, columns.url, columns.reference):
            if name and pa.types.is_nested(schema.field(name).type):
                raise SourceError(f"{path}: column {name!r} is {schema.field(name).type}, not text; map another column")
        for name in names:
            if name in schema.names:
                seen[name].setdefault(schema.field(name).type, path)
            elif needed:
                raise _lacks(path, name, "source.passthrough", schema)
        for reason in active_filters(filter):
            if FILTER_COLUMNS[reason] not in schema.names:
                raise _lacks(path, FILTER_COLUMNS[reason], f"the {reason} filter", schema)
    fields = list(PAIR_FIELDS)
    if reference:
        fields.append(pa.field(REFERENCE, pa.string()))
    fields += [pa.field(name, widest(name, types)) for name, types in seen.items() if types]
    return pa.schema(fields)


def without_foreign(shards: Sequence[Shard], source: SourceConfig, filter: FilterConfig) -> tuple[Shard, ...]:
    """The shards. One whose needed columns have an Arrow extension type that is not read becomes unreadable, with that error."""
    return tuple(_refused(shard, source, filter) if shard.refused else shard for shard in shards)


def _refused(shard: Shard, source: SourceConfig, filter: FilterConfig) -> Shard:
    assert shard.schema is not None
    roles = role_columns(column_map(source, shard.schema.names, shard.path)).values()
    filters = [FILTER_COLUMNS[reason] for reason in active_filters(filter)]
    for name in (*roles, *passthrough_columns(source)[0], *filters):
        if name in shard.refused:
            return replace(shard, rows=None, row_groups=(), schema=None, error=foreign_type(name, shard.refused[name]))
    return shard


def active_filters(filter: FilterConfig) -> list[FilterReason]:
    """The filters in use that need a column of their own."""
    limits = {
        FilterReason.PUNSAFE: filter.max_punsafe,
        FilterReason.PWATERMARK: filter.max_pwatermark,
        FilterReason.SIMILARITY: filter.min_similarity,
    }
    return [reason for reason, limit in limits.items() if limit is not None]


def role_columns(columns: ColumnMap) -> dict[str, str]:
    """Name in the output -> name in the shard, for the roles that the shard has."""
    roles = {
        URL: columns.url,
        RAW: columns.raw,
        SYNTHETIC: columns.synthetic,
        REFERENCE: columns.reference,
    }
    return {role: name for role, name in roles.items() if name}


def widest(name: str, types: dict[pa.DataType, str]) -> pa.DataType:
    """The frozen type of column `name`. `types`: each type that occurs -> a shard that has it. Raises SourceError."""
    plain = {_plain(t): path for t, path in types.items()}
    plain.pop(pa.null(), None)
    kinds = list(plain)
    if not kinds:
        return pa.string()  # all values are null
    if len(kinds) == 1:
        return kinds[0]
    if any(pa.types.is_nested(t) for t in kinds):
        (first, where), (second, elsewhere) = list(plain.items())[:2]
        raise SourceError(
            f"source.passthrough: column {name!r} is {first} in {where} but {second} in {elsewhere}; leave it out"
        )
    if all(pa.types.is_integer(t) or pa.types.is_floating(t) for t in kinds) and pa.float64() in kinds:
        return pa.float64()
    return pa.string()


def cast_column(column: pa.ChunkedArray, type: pa.DataType) -> tuple[pa.Array, int]:
    """`column` as `type`, and the number of cells that could not be cast and became null. UTF-8 is not checked here."""
    array = column.combine_chunks()
    array = array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    if array.type == type:
        return array, 0
    if pa.types.is_string(type) and (pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type)):
        return array, 0  # bytes stay bytes until caption_pairs checks them
    try:  # unsafe for floats only: an integer above 2**53 is rounded to a float, as the table above says
        return array.cast(type, safe=not pa.types.is_floating(type)), 0
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        cells = [_cell(value, type) for value in array.to_pylist()]
        cast = pa.array(cells, type)
        return cast, cast.null_count - array.null_count


def numbers(table: pa.Table, name: str) -> pa.Array:
    """A column as numbers; null for a cell that is no number, as in a passthrough column of text."""
    return cast_column(table[name], pa.float64())[0]


def _plain(type: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(type):
        return _plain(type.value_type)
    if pa.types.is_large_string(type) or pa.types.is_string_view(type):
        return pa.string()
    if pa.types.is_large_binary(type) or pa.types.is_binary_view(type) or pa.types.is_fixed_size_binary(type):
        return pa.binary()
    if pa.types.is_integer(type):
        return pa.uint64() if type == pa.uint64() else pa.int64()
    return pa.float64() if pa.types.is_floating(type) else type


def _cell(value: Any, type: pa.DataType) -> Any:
    """One cell as `type`, for a column that could not be cast as a whole; None if the cell cannot be cast."""
    try:
        if value is None:
            return None
        if pa.types.is_integer(type):
            number = int(value)
            return number if number == float(value) and -(2**63) <= number < 2**63 else None
        if pa.types.is_floating(type):
            return float(value)
        if pa.types.is_string(type):
            return value if isinstance(value, str) else json.dumps(value, default=str)
        if pa.types.is_boolean(type) and isinstance(value, str):
            return {"true": True, "false": False}.get(value.lower())
        return pa.scalar(value, type).as_py()
    except (ValueError, TypeError, OverflowError, pa.ArrowException):
        return None


def _lacks(path: str, name: str, needed_by: str, schema: pa.Schema) -> SourceError:
    return SourceError(f"{path}: no column {name!r}, which {needed_by} needs; it has: {', '.join(schema.names)}")
