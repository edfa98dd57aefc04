"""Join the rows of one bucket: one pair per key that both tables have. Pure: Arrow tables in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capsfusion_ray.core.columns import RAW, SYNTHETIC, URL
from capsfusion_ray.pairing.audit import EXAMPLES, Audit, SideAudit
from capsfusion_ray.pairing.shuffle_rows import (
    CAPTION,
    KEY,
    LINK,
    LOST,
    LOST_REASONS,
    RAW_SIDE,
    ROW,
    ROWS,
    SHARD,
    SIDE,
    SIDES,
    SYNTHETIC_SIDE,
)

CAST_ROWS = 65_536


def pair_schema(carried: Sequence[pa.Field]) -> pa.Schema:
    """The columns of the paired table, by the names that source.preset=generic looks for first."""
    return pa.schema([pa.field(name, pa.string()) for name in (URL, RAW, SYNTHETIC)] + list(carried))


def join_bucket(bucket: pa.Table, carried: Sequence[pa.Field]) -> tuple[pa.Table, Audit]:
    """The pairs of one bucket in `pair_schema`, in the order of the raw table, and the counts of its rows.

    If several rows of a table have one key, the first by shard and row is taken. The order of the bucket's rows does not
    matter. The URL of a pair is that of the raw row, or of the synthetic row if that is null.
    """
    taken, counts = {}, {}
    for side in SIDES:
        mine = bucket.filter(pc.equal(bucket[SIDE], side))
        taken[side], counts[side] = _first_of_each(mine.filter(pc.is_null(mine[LOST])))
        counts[side] |= _lost(mine.filter(pc.is_valid(mine[LOST])))
    raw, synthetic = taken[RAW_SIDE], taken[SYNTHETIC_SIDE]
    at = pc.index_in(raw[KEY], value_set=synthetic[KEY].combine_chunks())
    back = pc.is_in(synthetic[KEY], value_set=raw[KEY].combine_chunks())
    left, right = raw.filter(pc.is_valid(at)), synthetic.take(at.drop_null())
    order = pc.sort_indices(left, [(SHARD, "ascending"), (ROW, "ascending")])
    left, right = left.take(order), right.take(order)
    for side, lonely in ((RAW_SIDE, raw.filter(pc.is_null(at))), (SYNTHETIC_SIDE, synthetic.filter(pc.invert(back)))):
        keys = lonely[KEY].slice(0, EXAMPLES).to_pylist()  # sorted by _first_of_each
        counts[side] |= {"matched": left.num_rows, "unmatched": lonely.num_rows, "unmatched_keys": tuple(keys)}
    audit = Audit(
        SideAudit(**counts[RAW_SIDE]), SideAudit(**counts[SYNTHETIC_SIDE]), int(bucket.num_rows > 0), bucket.num_rows
    )
    return _paired(left, right, carried), audit


def _paired(left: pa.Table, right: pa.Table, carried: Sequence[pa.Field]) -> pa.Table:
    """Row i of `left` (raw) and row i of `right` (synthetic) as a row of `pair_schema`."""
    columns = {URL: pc.coalesce(left[LINK], right[LINK]), RAW: left[CAPTION], SYNTHETIC: right[CAPTION]}
    # A passthrough column comes from one table, and is null in all rows of the other. (pc.coalesce does not take lists.)
    columns |= {f.name: (right if left[f.name].null_count == left.num_rows else left)[f.name] for f in carried}
    # The cast goes slice by slice, because a string column of 32-bit offsets holds at most 2 GiB.
    pairs, schema = pa.table(columns), pair_schema(carried)
    slices = [pairs.slice(first, CAST_ROWS).cast(schema) for first in range(0, pairs.num_rows, CAST_ROWS)]
    return pa.concat_tables([schema.empty_table(), *slices])


def _first_of_each(table: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
    """The first row of every key by shard and row, sorted by key; and counts of the other rows."""
    table = table.take(
        pc.sort_indices(table, [(KEY, "ascending"), (SHARD, "ascending"), (ROW, "ascending")])
    ).combine_chunks()
    if table.num_rows == 0:
        return table, {}
    keys = table[KEY].combine_chunks()
    is_first = np.concatenate(
        [[True], pc.not_equal(keys.slice(1), keys.slice(0, len(keys) - 1)).to_numpy(zero_copy_only=False)]
    )
    first = table.filter(pa.array(is_first))
    others = table.filter(pa.array(~is_first))
    of_first = first[CAPTION].take(pa.array((np.cumsum(is_first) - 1)[~is_first]))
    same = pc.or_(
        pc.fill_null(pc.equal(others[CAPTION], of_first), False),
        pc.and_(pc.is_null(others[CAPTION]), pc.is_null(of_first)),
    )
    return first, {
        "duplicates": others.num_rows,
        "conflicting": others.num_rows - (pc.sum(same).as_py() or 0),
        "duplicate_keys": tuple(pc.unique(others[KEY]).slice(0, EXAMPLES).to_pylist()),
    }


def _lost(table: pa.Table) -> dict[str, int]:
    """The counts of rows that cannot be joined, by reason."""
    return {reason: pc.sum(table.filter(pc.equal(table[LOST], reason))[ROWS]).as_py() or 0 for reason in LOST_REASONS}
