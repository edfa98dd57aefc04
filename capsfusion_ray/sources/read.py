"""Row ranges of a shard as Arrow tables of caption pairs: renamed, cast, checked, filtered. Knows no Ray and no engine.

A row group, and a text file, is decoded once for all ranges asked together, a batch at a time. Damage inside a row group
costs that group's rows from the damaged batch on; they are named, and the next row group is read.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from capsfusion_ray.core.columns import INVALID, RAW, ROLES, ROW_ID, SYNTHETIC
from capsfusion_ray.core.parquet import open_parquet
from capsfusion_ray.core.types import FilterReason
from capsfusion_ray.errors import SourceError, StorageError
from capsfusion_ray.sources import text
from capsfusion_ray.sources.filters import filter_mask
from capsfusion_ray.sources.presets import FILTER_COLUMNS, column_map
from capsfusion_ray.sources.schema import active_filters, cast_column, role_columns
from capsfusion_ray.sources.shard import (
    BATCH_ROWS,
    DAMAGE,
    Decoded,
    ReadSpec,
    Shard,
    UnitRows,
    UnreadableRange,
    damage_of,
)
from capsfusion_ray.storage import Store, patiently

LOG = logging.getLogger(__name__)

Piece = Decoded | UnreadableRange
BadCells = Counter[tuple[str, str]]  # column, and what became of its cells
_NULLED = "could not be read as the frozen type; they are null"
_REPAIRED = "are no UTF-8; U+FFFD stands for what they hold"


def read_patiently(shard: Shard, ranges: Sequence[tuple[int, int]], spec: ReadSpec) -> Iterator[UnitRows]:
    """As `iter_units`; a store that fails is waited out, and what was read is not read again."""
    found, done = iter_units(shard, ranges, spec), 0

    def following() -> UnitRows:
        nonlocal found
        try:
            return next(found)
        except StorageError:
            found = iter_units(shard, ranges[done:], spec)
            raise

    while done < len(ranges):
        yield patiently(following)
        done += 1


def iter_units(shard: Shard, ranges: Sequence[tuple[int, int]], spec: ReadSpec) -> Iterator[UnitRows]:
    """One UnitRows for each [start, stop) of `ranges`, in their order, which must be ascending and without overlap.

    Ask for many ranges at once: the decoding is shared. Memory: one batch and the range being gathered. Raises StorageError
    where the store fails (retry), SourceError where the file is gone.
    """
    if any(b[0] < a[1] for a, b in itertools.pairwise(ranges)) or any(a >= b for a, b in ranges):
        raise ValueError(f"{shard.path}: ranges must be ascending, without overlap and not empty: {ranges}")
    if not ranges:
        return
    pieces = _pieces(shard, ranges, spec)
    piece = next(pieces, None)
    empty = spec.schema.append(pa.field(INVALID, pa.string())).empty_table()
    bad_cells = BadCells()
    for start, stop in ranges:
        tables, filtered, unreadable, at = [empty], Counter[FilterReason](), list[UnreadableRange](), start
        while piece is not None and at < stop:
            first, last = _span(piece)
            low, high = max(first, at), min(last, stop)
            if low < high:
                if isinstance(piece, Decoded):
                    pairs = _caption_pairs(piece, low, high, shard, spec, bad_cells)
                    keep, counts = filter_mask(pairs, spec.filter)
                    filtered.update(counts)
                    tables.append((pairs.filter(keep) if counts else pairs).select(empty.column_names))
                else:
                    unreadable.append(UnreadableRange(low, high, piece.error))
                at = high
            if last <= stop:
                piece = next(pieces, None)
        if at < stop:
            unreadable.append(UnreadableRange(at, stop, f"the file ends after row {at}"))
        yield UnitRows(start, stop, pa.concat_tables(tables).combine_chunks(), dict(filtered), tuple(unreadable))
    for (column, became), count in (+bad_cells).items():  # "+" leaves out the zeros
        LOG.warning("%s: %d cells of %r %s", shard.path, count, column, became)


def read_rows(shard: Shard, start: int, stop: int, spec: ReadSpec) -> UnitRows:
    """Rows [start, stop) of a shard."""
    return next(iter_units(shard, [(start, stop)], spec))


def sample(shards: Sequence[Shard], n: int, spec: ReadSpec) -> pa.Table:
    """About `n` rows (fewer if filtered) from up to 16 shards spread over the input; the same ones every time.

    Taken at the head of a row group in the middle of each shard: one row group is read, not the shard.
    """
    readable = [shard for shard in shards if shard.rows]
    chosen = [readable[i * len(readable) // min(16, len(readable))] for i in range(min(16, len(readable)))]
    tables = [spec.schema.append(pa.field(INVALID, pa.string())).empty_table()]
    for shard in chosen:
        middle = len(shard.row_groups) // 2
        start = sum(shard.row_groups[:middle])
        stop = min(start + -(-n // len(chosen)), shard.rows or 0)
        if start < stop:
            tables.append(read_rows(shard, start, stop, spec).table)
    return pa.concat_tables(tables).slice(0, n)


# ------------------------------------------------------------------------------------------------ decoding


def _span(piece: Piece) -> tuple[int, int]:
    if isinstance(piece, UnreadableRange):
        return piece.start, piece.stop
    return piece.start, piece.start + piece.table.num_rows


def _pieces(shard: Shard, ranges: Sequence[tuple[int, int]], spec: ReadSpec) -> Iterator[Piece]:
    """What the file holds for `ranges`, in row order: decoded batches and ranges that damage hides."""
    assert shard.schema is not None, f"{shard.path}: unreadable shards have no ranges"
    roles = role_columns(column_map(spec.source, shard.schema.names, shard.path))
    extra = [*spec.schema.names, *(FILTER_COLUMNS[reason] for reason in active_filters(spec.filter))]
    carried = [name for name in extra if name not in _RUN_COLUMNS and name in shard.schema.names]
    columns = list(dict.fromkeys([*roles.values(), *carried]))
    store = Store(shard.root, spec.options)
    try:
        if shard.format == "parquet":
            yield from _parquet_pieces(store, shard, ranges, columns)
        else:
            yield from _text_pieces(store, shard, ranges, columns)
    except FileNotFoundError as error:
        raise SourceError(f"{store.url(shard.file)}: planned, but gone now; put it back, or plan again") from error


_RUN_COLUMNS = frozenset((*ROLES, ROW_ID))


def _parquet_pieces(
    store: Store, shard: Shard, ranges: Sequence[tuple[int, int]], columns: list[str]
) -> Iterator[Piece]:
    with store.open_input(shard.file) as source:
        try:
            # checksums: a flipped bit in an uncompressed page would otherwise come out as a caption
            file = open_parquet(source, columns, page_checksum_verification=True)
            if [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] != list(shard.row_groups):
                raise ValueError("its row groups are not those of the plan: the file was replaced")
        except DAMAGE as error:
            yield UnreadableRange(0, shard.rows or 0, damage_of(error, store.url(shard.file)))
            return
        group_start = 0
        for group, group_rows in enumerate(shard.row_groups):
            start, stop = group_start, group_start + group_rows
            group_start = stop
            inside = [r for r in ranges if r[0] < stop and r[1] > start]
            if not inside:
                continue
            at = start
            try:
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                    yield Decoded(at, pa.Table.from_batches([batch]))
                    at += batch.num_rows
                    if at >= inside[-1][1]:
                        break
            except DAMAGE as error:
                yield UnreadableRange(at, stop, f"row group {group}: {damage_of(error, store.url(shard.file))}")


def _text_pieces(store: Store, shard: Shard, ranges: Sequence[tuple[int, int]], columns: list[str]) -> Iterator[Piece]:
    at = 0
    try:
        with text.open_text(store, shard.file, shard.compression) as stream:
            for piece in text.decode(stream, shard.format, shard.schema, columns, ranges):
                yield piece
                at = piece.start + piece.table.num_rows
    except FileNotFoundError:
        raise
    except DAMAGE as error:
        yield UnreadableRange(at, shard.rows or 0, damage_of(error, store.url(shard.file)))


# ------------------------------------------------------------------------------------------------ one batch


def _caption_pairs(piece: Decoded, low: int, high: int, shard: Shard, spec: ReadSpec, bad_cells: BadCells) -> pa.Table:
    """Rows [low, high) of a decoded batch, with the frozen schema, INVALID and the filters' columns."""
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
    """`array` as proper strings and, if some were not UTF-8, a mask of those, which are returned repaired.

    Arrow trusts the files it reads; its cast from bytes is the check, at memory speed.
    """
    data = array.cast(pa.binary())
    try:
        return data.cast(pa.string()), None
    except pa.ArrowInvalid:
        values = data.to_pylist()
        repaired = [v if v is None else v.decode("utf-8", "replace") for v in values]
        wrong = [r is not None and r.encode() != v for v, r in zip(values, repaired, strict=True)]
        return pa.array(repaired, pa.string()), pa.array(wrong, pa.bool_())
