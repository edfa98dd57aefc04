"""Read row ranges of a shard as Arrow tables of caption pairs. Knows no Ray and no engine.

Damage costs rows, which are named as unreadable; the rest of the shard is read.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa

from capsfusion_ray.core.columns import INVALID
from capsfusion_ray.core.types import FilterReason
from capsfusion_ray.errors import SourceError, StorageError
from capsfusion_ray.sources.caption_pairs import BadCells, caption_pairs, wanted_columns
from capsfusion_ray.sources.filters import filter_mask
from capsfusion_ray.sources.formats import FORMATS
from capsfusion_ray.sources.shard import Decoded, ReadSpec, Shard, UnitRows, UnreadableRange
from capsfusion_ray.storage import Store, patiently

LOG = logging.getLogger(__name__)


def read_patiently(shard: Shard, ranges: Sequence[tuple[int, int]], spec: ReadSpec) -> Iterator[UnitRows]:
    """Like `iter_units`, but waits while the store fails. Units that were read are not read again."""
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
    """One UnitRows per row range [start, stop) of `ranges`, which must be ascending and without overlap.

    A row group is decoded once for all ranges of one call. Memory: one batch and the range that is gathered. Raises
    StorageError if the store fails (retry), SourceError if the file is gone.
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
        unit = _Gathered(start)
        while piece is not None and unit.at < stop:
            unit.take(piece, stop, shard, spec, bad_cells)
            if piece.stop <= stop:
                piece = next(pieces, None)
        yield unit.rows(stop, empty)
    for (column, became), count in (+bad_cells).items():  # "+" drops counts of zero
        LOG.warning("%s: %d cells of %r %s", shard.path, count, column, became)


class _Gathered:
    """The rows of one row range, gathered piece by piece from row `start` on."""

    def __init__(self, start: int) -> None:
        self.start = self.at = start
        self._tables: list[pa.Table] = []
        self._filtered = Counter[FilterReason]()
        self._unreadable: list[UnreadableRange] = []

    def take(
        self, piece: Decoded | UnreadableRange, stop: int, shard: Shard, spec: ReadSpec, bad_cells: BadCells
    ) -> None:
        """Add the rows of `piece` that are in the range and before `stop`."""
        low, high = max(piece.start, self.at), min(piece.stop, stop)
        if low >= high:
            return
        if isinstance(piece, Decoded):
            pairs = caption_pairs(piece, low, high, shard, spec, bad_cells)
            keep, counts = filter_mask(pairs, spec.filter)
            self._filtered.update(counts)
            names = [*spec.schema.names, INVALID]
            self._tables.append((pairs.filter(keep) if counts else pairs).select(names))
        else:
            self._unreadable.append(UnreadableRange(low, high, piece.error))
        self.at = high

    def rows(self, stop: int, empty: pa.Table) -> UnitRows:
        """The result for rows [start, stop); `empty` is a table of its schema."""
        if self.at < stop:
            self._unreadable.append(UnreadableRange(self.at, stop, f"the file ends after row {self.at}"))
        table = pa.concat_tables([empty, *self._tables]).combine_chunks()
        return UnitRows(self.start, stop, table, dict(self._filtered), tuple(self._unreadable))


def read_rows(shard: Shard, start: int, stop: int, spec: ReadSpec) -> UnitRows:
    """Rows [start, stop) of a shard."""
    return next(iter_units(shard, [(start, stop)], spec))


def sample(shards: Sequence[Shard], n: int, spec: ReadSpec) -> pa.Table:
    """About `n` rows (fewer after filters) of up to 16 shards spread over the input; every call returns the same rows.

    They are the first rows of a row group in the middle of each shard, so that one row group per shard is read.
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


def _pieces(shard: Shard, ranges: Sequence[tuple[int, int]], spec: ReadSpec) -> Iterator[Decoded | UnreadableRange]:
    """The decoded batches and the unreadable ranges of `ranges`, in row order."""
    columns, store = wanted_columns(shard, spec), Store(shard.root, spec.options)
    try:
        yield from FORMATS[shard.format].decode(store, shard, ranges, columns)
    except FileNotFoundError as error:
        raise SourceError(f"{store.url(shard.file)}: it was planned and is gone; restore it, or plan again") from error
