"""The rows between the two passes of a join. Pure: Arrow tables in and out.

A row of a table that can be joined is one row here. Rows that cannot be joined are one row per cause with their number, so that
every row of both tables arrives in a bucket and is counted there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from capsfusion_ray.core.columns import INVALID, RAW, ROW_ID, URL
from capsfusion_ray.pairing.keys import buckets_of, keys_of

RAW_SIDE, SYNTHETIC_SIDE = "raw", "synthetic"
SIDES = (RAW_SIDE, SYNTHETIC_SIDE)

# PairConfig refuses columns with a leading "_", so that none has one of these names.
BUCKET, SIDE, LOST, ROWS, KEY, SHARD, ROW, CAPTION, LINK = (
    "_bucket",
    "_side",
    "_lost",
    "_rows",
    "_key",
    "_shard",
    "_row",
    "_caption",
    "_url",
)
LOST_REASONS = ("unreadable", "unusable", "without_key")
# Between the passes a column of a bucket may be larger than 2 GiB, which 32-bit offsets cannot address.
_WIDE = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}


def shuffle_schema(carried: Sequence[pa.Field]) -> pa.Schema:
    """The columns of these rows; `carried` are the passthrough columns of both tables."""
    named = [
        (BUCKET, pa.int32()),
        (SIDE, pa.string()),
        (LOST, pa.string()),  # null for a row that can be joined, else one of LOST_REASONS
        (ROWS, pa.int64()),  # how many rows of the table it counts
        (KEY, pa.large_string()),
        (SHARD, pa.int32()),
        (ROW, pa.int64()),
        (CAPTION, pa.large_string()),
        (LINK, pa.large_string()),
    ]
    return pa.schema(
        [*(pa.field(name, type_) for name, type_ in named), *(f.with_type(_WIDE.get(f.type, f.type)) for f in carried)]
    )


@dataclass(frozen=True)
class TableShuffle:
    """How the rows of one table become rows of `schema`."""

    side: str
    key: str  # the column of the key
    carried: Sequence[str]  # the table's passthrough columns
    normalise: str  # none or url: see keys_of
    partitions: int  # number of buckets
    schema: pa.Schema

    def rows(self, shard: int, table: pa.Table, unreadable: int) -> pa.Table:
        """The rows of one row range of shard number `shard`.

        `table` has ROW_ID, RAW (the caption of either side), URL, the key, the passthrough columns, and INVALID: null, or why
        the row cannot be used. `unreadable`: rows of the range that cannot be read.
        """
        keys = keys_of(table[self.key].combine_chunks(), self.normalise)
        # Bytes that are no UTF-8 were read as U+FFFD. Such keys are equal now, and would pair captions of different images.
        keys = pc.if_else(pc.match_substring(keys, "\ufffd"), pa.scalar(None, keys.type), keys)
        usable = pc.is_null(table[INVALID]).combine_chunks()
        keyed = pc.is_valid(keys)
        good = pc.and_(usable, keyed)
        lost = {
            "unreadable": unreadable,
            "unusable": pc.sum(pc.invert(usable)).as_py() or 0,
            "without_key": pc.sum(pc.and_(usable, pc.invert(keyed))).as_py() or 0,
        }
        return pa.concat_tables([self._joinable(shard, table.filter(good), keys.filter(good)), self._lost(shard, lost)])

    def _joinable(self, shard: int, table: pa.Table, keys: pa.Array) -> pa.Table:
        # A row id is "<path>:<row>", and the path may contain colons.
        numbers = pc.struct_field(pc.extract_regex(table[ROW_ID], r":(?P<row>\d+)$"), "row").cast(pa.int64())
        columns: dict[str, Any] = {
            BUCKET: buckets_of(keys, self.partitions),
            SIDE: pa.repeat(self.side, len(keys)),
            ROWS: pa.repeat(1, len(keys)),
            KEY: keys,
            SHARD: pa.repeat(shard, len(keys)),
            ROW: numbers,
            CAPTION: table[RAW],
            LINK: table[URL],
        }
        return _filled(columns | {name: table[name] for name in self.carried}, len(keys), self.schema)

    def _lost(self, shard: int, counts: Mapping[str, int]) -> pa.Table:
        """One row per cause with a count, in a bucket that depends on the shard only."""
        bad = [(reason, count) for reason, count in counts.items() if count]
        columns = {
            BUCKET: pa.array([shard % self.partitions] * len(bad)),
            SIDE: pa.array([self.side] * len(bad)),
            LOST: pa.array([reason for reason, _ in bad], pa.string()),
            ROWS: pa.array([count for _, count in bad], pa.int64()),
        }
        return _filled(columns, len(bad), self.schema)


def _filled(columns: Mapping[str, Any], length: int, schema: pa.Schema) -> pa.Table:
    """A table of `schema` from `columns`; the columns that are not given are null."""
    arrays = [columns[f.name] if f.name in columns else pa.nulls(length, f.type) for f in schema]
    return pa.table(dict(zip(schema.names, arrays, strict=True))).cast(schema)
