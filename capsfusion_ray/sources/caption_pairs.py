"""One decoded batch -> caption pairs in the frozen schema: columns renamed, cast and checked."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from capsfusion_ray.core.columns import INVALID, RAW, ROLES, ROW_ID, SYNTHETIC
from capsfusion_ray.sources.presets import FILTER_COLUMNS, column_map
from capsfusion_ray.sources.schema import active_filters, cast_column, role_columns
from capsfusion_ray.sources.shard import Decoded, ReadSpec, Shard

BadCells = Counter[tuple[str, str]]  # (column, what happened to its cells) -> number of cells
_NULLED = "could not be read as the frozen type; they are null"
_REPAIRED = "are not UTF-8; U+FFFD replaces what could not be read"
_OF_THE_RUN = frozenset((*ROLES, ROW_ID))


def wanted_columns(shard: Shard, spec: ReadSpec) -> list[str]:
    """The columns of a shard that must be decoded: those of the captions, the passthrough columns and the filters."""
    assert shard.schema is not None, f"{shard.path}: unreadable shards have no ranges"
    roles = role_columns(column_map(spec.source, shard.schema.names, shard.path))
    extra = [*spec.schema.names, *(FILTER_COLUMNS[reason] for reason in active_filters(spec.filter))]
    extra = [name for name in extra if name not in _OF_THE_RUN and name in shard.schema.names]
    return list(dict.fromkeys([*roles.values(), *extra]))


def caption_pairs(piece: Decoded, low: int, high: int, shard: Shard, spec: ReadSpec, bad_cells: BadCells) -> pa.Table:
    """Rows [low, high) of a decoded batch with the frozen schema, INVALID and the columns of the filters.

    Cells that cannot be read as they should are counted in `bad_cells`.
    """
    assert shard.schema is not None
    source = piece.table.slice(low - piece.start, high - low)
    roles = role_columns(column_map(spec.source, shard.schema.names, shard.path))
    invalid = (
        pa.nulls(high - low, pa.string()) if piece.broken is None else piece.broken.slice(low - piece.start, high - low)
    )
    columns: dict[str, pa.Array] = {}
    for field in spec.schema:
        name = roles.get(field.name, "") if field.name in ROLES else field.name
        if field.name == ROW_ID:
            numbers = pa.array(range(low, high), pa.int64()).cast(pa.string())
            columns[field.name] = pc.binary_join_element_wise(shard.path, numbers, ":")
        elif not name or name not in source.column_names:
            columns[field.name] = pa.nulls(high - low, field.type)
        else:
            array, bad = cast_column(source[name], field.type)
            if pa.types.is_string(field.type):
                array, wrong = _valid_utf8(array)
                if wrong is not None and field.name in (RAW, SYNTHETIC):
                    invalid = pc.coalesce(invalid, pc.if_else(wrong, field.name, pa.scalar(None, pa.string())))
                elif wrong is not None:
                    bad_cells[field.name, _REPAIRED] += pc.sum(wrong).as_py()
            bad_cells[field.name, _NULLED] += bad
            columns[field.name] = array
    columns[INVALID] = invalid
    for reason in active_filters(spec.filter):
        name = FILTER_COLUMNS[reason]
        if name not in columns:
            columns[name], bad = cast_column(source[name], pa.float64())
            bad_cells[name, _NULLED] += bad
    return pa.table(columns)


def _valid_utf8(array: pa.Array) -> tuple[pa.Array, pa.Array | None]:
    """`array` with valid UTF-8 only, and a mask of the repaired values, or None if all were valid.

    Arrow does not check the strings of a file. Its cast from bytes to string does, at the speed of memory.
    """
    data = array.cast(pa.binary())
    try:
        return data.cast(pa.string()), None
    except pa.ArrowInvalid:
        values = data.to_pylist()
        repaired = [v if v is None else v.decode("utf-8", "replace") for v in values]
        wrong = [r is not None and r.encode() != v for v, r in zip(values, repaired, strict=True)]
        return pa.array(repaired, pa.string()), pa.array(wrong, pa.bool_())
