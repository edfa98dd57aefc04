"""The join of a bucket, compared with plain dictionaries: every row of both tables is paired once or counted under one cause."""

import json
from dataclasses import asdict, replace

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsfusion_ray.errors import AccountingError
from capsfusion_ray.pairing.audit import Audit
from capsfusion_ray.pairing.bucket_join import join_bucket, pair_schema
from capsfusion_ray.pairing.shuffle_rows import BUCKET, SIDES, TableShuffle, shuffle_schema

CARRIED = [pa.field("width", pa.int64()), pa.field("tags", pa.list_(pa.string()))]
SCHEMA = shuffle_schema(CARRIED)
PARTITIONS = 3


def text_array(values):
    return pa.array(values, pa.string())


def table_of(side, cells, shard):
    """A row range as the sources return it; `cells`: (key, caption, url, invalid)."""
    keys, captions, urls, invalid = zip(*cells, strict=True) if cells else ((), (), (), ())
    carried = (
        {"width": pa.array(range(len(cells)), pa.int64())}
        if side == "raw"
        else {"tags": pa.array([[side]] * len(cells), pa.list_(pa.string()))}
    )
    columns = {
        "row_id": text_array([f"a:b/{shard}.parquet:{i}" for i in range(len(cells))]),
        "laion_2b": text_array(captions),
    }
    columns |= {
        "laion_coco": text_array(captions),
        "image_url": text_array(urls),
        "k": text_array(keys),
        "_invalid": text_array(invalid),
    }
    return pa.table(columns | carried)


def shuffled(side, shards, unreadable=0, normalise="none"):
    carried = ["width"] if side == "raw" else ["tags"]
    shuffle = TableShuffle(side, "k", carried, normalise, PARTITIONS, SCHEMA)
    return [shuffle.rows(n, table_of(side, cells, n), unreadable) for n, cells in enumerate(shards)]


def joined(tables):
    everything = pa.concat_tables(tables)
    audit, rows = Audit(), []
    for bucket in sorted(set(everything[BUCKET].to_pylist())):
        pairs, one = join_bucket(everything.filter(pa.compute.equal(everything[BUCKET], bucket)), CARRIED)
        assert pairs.schema == pair_schema(CARRIED)
        audit += Audit.from_dict(json.loads(json.dumps(asdict(one))))
        rows += pairs.to_pylist()
    return rows, audit


KEYS = st.sampled_from(["a", "b", "c", "é", " a", "0", "00", "", None])
CELLS = st.lists(
    st.tuples(
        KEYS,
        st.sampled_from(["x", "y", "", None]),
        st.sampled_from(["u1", "u2", None]),
        st.sampled_from([None, None, None, "json"]),
    ),
    max_size=8,
)
SHARDS = st.lists(CELLS, max_size=3)


def by_dictionary(raw, synthetic):
    """The expected pairs: rows in order into dictionaries; the first row of each key stays."""
    taken, counts = {}, {}
    for side, shards in zip(SIDES, (raw, synthetic), strict=True):
        first, count = {}, dict.fromkeys(("duplicates", "conflicting", "without_key", "unusable"), 0)
        for cells in shards:
            for at, (key, caption, url, invalid) in enumerate(cells):
                if invalid:
                    count["unusable"] += 1
                elif not key:
                    count["without_key"] += 1
                elif key in first:
                    count["duplicates"] += 1
                    count["conflicting"] += first[key][0] != caption
                else:
                    first[key] = (caption, url, at)
        taken[side], counts[side] = first, count
    pairs = [
        {
            "image_url": r[1] or taken["synthetic"][key][1],
            "laion_2b": r[0],
            "laion_coco": taken["synthetic"][key][0],
            "width": r[2],
            "tags": ["synthetic"],
        }
        for key, r in taken["raw"].items()
        if key in taken["synthetic"]
    ]
    for side in SIDES:
        counts[side] |= {"matched": len(pairs), "unmatched": len(taken[side]) - len(pairs)}
    return pairs, counts


def canonical(pairs):
    return sorted(json.dumps(pair, sort_keys=True) for pair in pairs)


@given(raw=SHARDS, synthetic=SHARDS, shuffle=st.randoms(use_true_random=False))
def test_pairs_and_counts_are_those_of_dictionaries_in_any_order_of_the_blocks(raw, synthetic, shuffle):
    tables = shuffled("raw", raw) + shuffled("synthetic", synthetic)
    shuffle.shuffle(tables)
    if not tables:
        return
    pairs, audit = joined(tables)
    expected, counts = by_dictionary(raw, synthetic)
    assert canonical(pairs) == canonical(expected)
    for side, shards in zip(SIDES, (raw, synthetic), strict=True):
        mine = asdict(getattr(audit, side))
        assert {name: mine[name] for name in counts[side]} == counts[side]
        assert getattr(audit, side).total == sum(map(len, shards))
    audit.check({"raw": sum(map(len, raw)), "synthetic": sum(map(len, synthetic))})
    again, same = joined(list(reversed(tables)))
    assert (again, same) == (pairs, audit), "the same order and the same examples"


def test_pairs_have_the_order_of_the_raw_table_and_a_missing_url_comes_from_the_other_table():
    raw = [[("k2", "r2", None, None), ("k1", "r1", "u1", None)], [("k0", "r0", None, None)]]
    synthetic = [[("k0", "s0", "v0", None), ("k1", "s1", "v1", None), ("k2", None, None, None)]]
    everything = pa.concat_tables(shuffled("raw", raw) + shuffled("synthetic", synthetic))
    pairs, _ = join_bucket(everything, CARRIED)
    assert [(p["image_url"], p["laion_2b"], p["laion_coco"]) for p in pairs.to_pylist()] == [
        (None, "r2", None),
        ("u1", "r1", "s1"),
        ("v0", "r0", "s0"),
    ]


def test_unreadable_rows_are_counted_and_a_lost_row_is_an_error():
    tables = shuffled("raw", [[("a", "x", None, None)]], unreadable=7) + shuffled(
        "synthetic", [[("a", "x", None, None)]]
    )
    _, audit = joined(tables)
    assert (audit.raw.unreadable, audit.raw.matched) == (7, 1)
    audit.check({"raw": 8, "synthetic": 1})
    with pytest.raises(AccountingError, match="raw: 9 rows planned, 8 accounted for"):
        audit.check({"raw": 9, "synthetic": 1})
    with pytest.raises(AccountingError, match="1 raw rows matched 2 synthetic"):
        replace(audit, synthetic=replace(audit.synthetic, matched=2)).check({"raw": 8, "synthetic": 2})
