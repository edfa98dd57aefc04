"""The rules of pairing two tables: keys, buckets, one bucket's join, the audit. Pure: Arrow tables in and out, no Ray, no files.

A row on its way to its bucket is a row of `exchange_schema`. Rows that cannot be joined travel as one row a cause, with
how many they are, so that every row of both tables arrives somewhere and is counted there.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capsfusion_ray.core.columns import INVALID, RAW, ROW_ID, SYNTHETIC, URL
from capsfusion_ray.errors import AccountingError

RAW_SIDE, SYNTHETIC_SIDE = "raw", "synthetic"
SIDES = (RAW_SIDE, SYNTHETIC_SIDE)

# Names that no column carried along may have; PairConfig refuses a leading "_".
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
EXAMPLES = 3  # keys shown of a kind
CAST_ROWS = 65_536
_WIDE = {
    pa.string(): pa.large_string(),
    pa.binary(): pa.large_binary(),
}  # between the passes a column of a bucket may be over 2 GiB


def exchange_schema(carried: Sequence[pa.Field]) -> pa.Schema:
    """What travels between reading and joining; `carried` are the columns of both tables that are carried along."""
    named = [
        (BUCKET, pa.int32()),
        (SIDE, pa.string()),
        (LOST, pa.string()),  # null: a row that can be joined; else one of LOST_REASONS
        (ROWS, pa.int64()),  # how many rows it stands for
        (KEY, pa.large_string()),
        (SHARD, pa.int32()),
        (ROW, pa.int64()),
        (CAPTION, pa.large_string()),
        (LINK, pa.large_string()),
    ]
    return pa.schema(
        [*(pa.field(name, type_) for name, type_ in named), *(f.with_type(_WIDE.get(f.type, f.type)) for f in carried)]
    )


def pair_schema(carried: Sequence[pa.Field]) -> pa.Schema:
    """What the paired table's files hold: the names that source.preset=generic looks for first."""
    return pa.schema([pa.field(name, pa.string()) for name in (URL, RAW, SYNTHETIC)] + list(carried))


# ----------------------------------------------------------------------------------------------------------------- keys


def normalised_urls(urls: pa.Array) -> pa.Array:
    """URLs that differ only as follows become equal; the result is a key, not a URL.

    White space around it is cut, `&amp;` is `&`, http and https (and no scheme before `//`) are one, the host is lower-cased
    (ASCII), the ports :80 and :443 and the fragment go, an empty path is `/`. Untouched: upper and lower case behind the
    host, `www.`, the order of the query, percent-escapes; and whatever is no http URL, but for the white space and `&amp;`.
    """
    plain = pc.replace_substring(pc.ascii_trim_whitespace(urls), "&amp;", "&")
    parts = pc.extract_regex(plain, r"^(?:(?i:https?):)?//(?P<host>[^/?#]*)(?P<rest>[^#]*)")
    host = pc.replace_substring_regex(pc.ascii_lower(pc.struct_field(parts, "host")), r":(?:80|443)$", "")
    rest = pc.replace_substring_regex(pc.struct_field(parts, "rest"), r"^(\?|$)", r"/\1")
    return pc.coalesce(pc.binary_join_element_wise(host, rest, ""), plain)


def keys_of(column: pa.Array, normalise: str) -> pa.Array:
    """A key column (text or integers) as the strings that are compared; null where a row has none. `normalise`: none or url."""
    keys = column.cast(pa.string())
    if normalise == "url":
        keys = normalised_urls(keys)
    return pc.if_else(pc.equal(keys, ""), pa.scalar(None, pa.string()), keys)


def buckets_of(keys: pa.Array, partitions: int) -> pa.Array:
    """The bucket of each key (no nulls): the same on every machine and in every version, as Python's hash() is not."""
    return pa.array([zlib.crc32(key) % partitions for key in keys.cast(pa.binary()).to_pylist()], pa.int32())


def read_spans(row_groups: Sequence[int], task_rows: int, block_rows: int) -> list[list[tuple[int, int]]]:
    """A shard's rows as tasks, each a list of ranges [start, stop) of at most `block_rows`.

    Small row groups are gathered up to `task_rows`; a larger one is a task of its own, so that each is decoded once.
    """
    spans: list[tuple[int, int]] = []
    start = stop = 0
    for group_rows in row_groups:
        if stop > start and stop - start + group_rows > task_rows:
            spans.append((start, stop))
            start = stop
        stop += group_rows
    if stop > start:
        spans.append((start, stop))
    return [[(at, min(at + block_rows, b)) for at in range(a, b, block_rows)] for a, b in spans]


def to_exchange(
    side: str,
    shard: int,
    table: pa.Table,
    key: str,
    carried: Sequence[str],
    unreadable: int,
    normalise: str,
    partitions: int,
    schema: pa.Schema,
) -> pa.Table:
    """A read range of one table as rows of `schema`.

    `table` has ROW_ID, RAW (the caption, whichever side), URL, the column `key`, those of `carried`,
    and presets.INVALID: null, or why the row cannot be used. `unreadable`: rows of the range that damage hides.
    """
    keys = keys_of(table[key].combine_chunks(), normalise)
    # Bytes that were no UTF-8 came as U+FFFD: different keys are alike now, and would pair captions of different images.
    keys = pc.if_else(pc.match_substring(keys, "\ufffd"), pa.scalar(None, keys.type), keys)
    usable = pc.is_null(table[INVALID]).combine_chunks()
    keyed = pc.is_valid(keys)
    lost = {
        "unreadable": unreadable,
        "unusable": pc.sum(pc.invert(usable)).as_py() or 0,
        "without_key": pc.sum(pc.and_(usable, pc.invert(keyed))).as_py() or 0,
    }
    good = pc.and_(usable, keyed)
    kept, keys = table.filter(good), keys.filter(good)
    # A row id is "<path>:<row>", and a path may hold colons.
    numbers = pc.struct_field(pc.extract_regex(kept[ROW_ID], r":(?P<row>\d+)$"), "row").cast(pa.int64())
    columns: dict[str, Any] = {
        BUCKET: buckets_of(keys, partitions),
        SIDE: pa.repeat(side, len(keys)),
        ROWS: pa.repeat(1, len(keys)),
        KEY: keys,
        SHARD: pa.repeat(shard, len(keys)),
        ROW: numbers,
        CAPTION: kept[RAW],
        LINK: kept[URL],
    }
    good_rows = _filled(columns | {name: kept[name] for name in carried}, len(keys), schema)
    bad = [(reason, count) for reason, count in lost.items() if count]
    columns = {
        BUCKET: pa.array([shard % partitions] * len(bad)),
        SIDE: pa.array([side] * len(bad)),
        LOST: pa.array([reason for reason, _ in bad], pa.string()),
        ROWS: pa.array([count for _, count in bad], pa.int64()),
    }
    return pa.concat_tables([good_rows, _filled(columns, len(bad), schema)])


def _filled(columns: Mapping[str, Any], length: int, schema: pa.Schema) -> pa.Table:
    arrays = [columns[f.name] if f.name in columns else pa.nulls(length, f.type) for f in schema]
    return pa.table(dict(zip(schema.names, arrays, strict=True))).cast(schema)


# ------------------------------------------------------------------------------------------------------------ the audit


@dataclass(frozen=True)
class SideAudit:
    """What became of one table's rows: `total` = all the others but `conflicting`, which is a part of `duplicates`."""

    matched: int = 0
    unmatched: int = 0  # the other table has no such key
    duplicates: int = 0  # an earlier row has the same key
    conflicting: int = 0  # duplicates whose caption is another than that of the row taken
    without_key: int = 0  # null or empty
    unusable: int = 0  # the caption is no UTF-8, or the line breaks its format
    unreadable: int = 0  # damage hides the row
    unmatched_keys: tuple[str, ...] = ()  # some
    duplicate_keys: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return self.matched + self.unmatched + self.duplicates + self.without_key + self.unusable + self.unreadable

    def __add__(self, other: SideAudit) -> SideAudit:
        mine, others = asdict(self), asdict(other)
        summed: dict[str, Any] = {name: mine[name] + others[name] for name in mine}
        for name in ("unmatched_keys", "duplicate_keys"):
            summed[name] = tuple(sorted(summed[name])[:EXAMPLES])  # the same ones in whatever order the buckets come
        return SideAudit(**summed)


@dataclass(frozen=True)
class Audit:
    """The join in figures: of one bucket, or of all of them added up."""

    raw: SideAudit = field(default_factory=SideAudit)
    synthetic: SideAudit = field(default_factory=SideAudit)
    buckets: int = 0  # that any row came to
    largest_bucket: int = 0  # its rows

    def __add__(self, other: Audit) -> Audit:
        largest = max(self.largest_bucket, other.largest_bucket)
        return Audit(self.raw + other.raw, self.synthetic + other.synthetic, self.buckets + other.buckets, largest)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Audit:
        """From `asdict`, through JSON too; keys of a side that are not known are passed over."""

        def side(name: str) -> SideAudit:
            known: dict[str, Any] = {f.name: values[name][f.name] for f in fields(SideAudit)}
            for examples in ("unmatched_keys", "duplicate_keys"):
                known[examples] = tuple(known[examples])  # JSON has lists
            return SideAudit(**known)

        return cls(side(RAW_SIDE), side(SYNTHETIC_SIDE), values["buckets"], values["largest_bucket"])

    def check(self, planned: Mapping[str, int]) -> None:
        """Raises AccountingError unless every planned row of both tables is counted, and the pairs are one to one."""
        for side, audit in ((RAW_SIDE, self.raw), (SYNTHETIC_SIDE, self.synthetic)):
            if audit.total != planned[side]:
                raise AccountingError(
                    f"{side}: {planned[side]} rows planned, {audit.total} accounted for: {asdict(audit)}"
                )
        if self.raw.matched != self.synthetic.matched:
            raise AccountingError(f"{self.raw.matched} raw rows matched {self.synthetic.matched} synthetic rows")


# ---------------------------------------------------------------------------------------------------- one bucket's join


def join_bucket(bucket: pa.Table, carried: Sequence[pa.Field]) -> tuple[pa.Table, Audit]:
    """The pairs of a bucket (`pair_schema`, ordered as the raw rows stood in their table), and what became of every row.

    Of several rows with one key the first by shard and row is taken, in both tables. The order of the bucket's rows does not
    matter. The image's URL is the raw row's, or the synthetic row's where that is null.
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
    columns = {URL: pc.coalesce(left[LINK], right[LINK]), RAW: left[CAPTION], SYNTHETIC: right[CAPTION]}
    # A carried column is null all over on the side that it does not come from. (coalesce knows no lists.)
    columns |= {f.name: (right if left[f.name].null_count == left.num_rows else left)[f.name] for f in carried}
    for side, lonely in ((RAW_SIDE, raw.filter(pc.is_null(at))), (SYNTHETIC_SIDE, synthetic.filter(pc.invert(back)))):
        keys = lonely[KEY].slice(0, EXAMPLES).to_pylist()  # sorted, as _first_of_each left them
        counts[side] |= {"matched": left.num_rows, "unmatched": lonely.num_rows, "unmatched_keys": tuple(keys)}
    audit = Audit(
        SideAudit(**counts[RAW_SIDE]), SideAudit(**counts[SYNTHETIC_SIDE]), int(bucket.num_rows > 0), bucket.num_rows
    )
    # A slice at a time: 32-bit offsets reach over 2 GiB of text and no further.
    pairs, schema = pa.table(columns), pair_schema(carried)
    slices = [pairs.slice(first, CAST_ROWS).cast(schema) for first in range(0, pairs.num_rows, CAST_ROWS)]
    return pa.concat_tables([schema.empty_table(), *slices]), audit


def _first_of_each(table: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
    """The first row of every key by shard and row, sorted by key; and the counts of the others."""
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
    return {reason: pc.sum(table.filter(pc.equal(table[LOST], reason))[ROWS]).as_py() or 0 for reason in LOST_REASONS}
