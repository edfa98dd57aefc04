"""Pairing: against a plain dictionary, every row of both tables is matched once or counted under one cause."""

import json
import zlib
from dataclasses import asdict, replace
from urllib.parse import urlsplit

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsfusion_ray.errors import AccountingError
from capsfusion_ray.pairing.rules import (
    BUCKET,
    SIDES,
    Audit,
    buckets_of,
    exchange_schema,
    join_bucket,
    keys_of,
    normalised_urls,
    pair_schema,
    read_spans,
    to_exchange,
)

CARRIED = [pa.field("width", pa.int64()), pa.field("tags", pa.list_(pa.string()))]
SCHEMA = exchange_schema(CARRIED)
PARTITIONS = 3


def text_array(values):
    return pa.array(values, pa.string())


def table_of(side, cells, shard):
    """A read range as the sources give it; `cells`: (key, caption, url, invalid)."""
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


def exchanged(side, shards, unreadable=0, normalise="none"):
    carried = ["width"] if side == "raw" else ["tags"]
    return [
        to_exchange(side, n, table_of(side, cells, n), "k", carried, unreadable, normalise, PARTITIONS, SCHEMA)
        for n, cells in enumerate(shards)
    ]


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
    """The oracle: rows in order into dictionaries, the first of each key stays."""
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
def test_as_a_dictionary_would_pair_them_in_whatever_order_the_blocks_come(raw, synthetic, shuffle):
    tables = exchanged("raw", raw) + exchanged("synthetic", synthetic)
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
    assert (again, same) == (pairs, audit), "the very order and the examples too"


def test_pairs_stand_as_the_raw_rows_stood_and_a_missing_url_is_the_other_sides():
    raw = [[("k2", "r2", None, None), ("k1", "r1", "u1", None)], [("k0", "r0", None, None)]]
    synthetic = [[("k0", "s0", "v0", None), ("k1", "s1", "v1", None), ("k2", None, None, None)]]
    everything = pa.concat_tables(exchanged("raw", raw) + exchanged("synthetic", synthetic))
    pairs, _ = join_bucket(everything, CARRIED)
    assert [(p["image_url"], p["laion_2b"], p["laion_coco"]) for p in pairs.to_pylist()] == [
        (None, "r2", None),
        ("u1", "r1", "s1"),
        ("v0", "r0", "s0"),
    ]


def test_what_damage_hides_is_counted_and_a_lost_row_is_noticed():
    tables = exchanged("raw", [[("a", "x", None, None)]], unreadable=7) + exchanged(
        "synthetic", [[("a", "x", None, None)]]
    )
    _, audit = joined(tables)
    assert (audit.raw.unreadable, audit.raw.matched) == (7, 1)
    audit.check({"raw": 8, "synthetic": 1})
    with pytest.raises(AccountingError, match="raw: 9 rows planned, 8 accounted for"):
        audit.check({"raw": 9, "synthetic": 1})
    with pytest.raises(AccountingError, match="1 raw rows matched 2 synthetic"):
        replace(audit, synthetic=replace(audit.synthetic, matched=2)).check({"raw": 8, "synthetic": 2})


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("http://Example.COM/A.jpg", "example.com/A.jpg"),
        ("https://example.com:443/A.jpg#top", "example.com/A.jpg"),
        (" HTTPS://example.com:80/A.jpg\n", "example.com/A.jpg"),
        ("//example.com/A.jpg", "example.com/A.jpg"),
        ("http://example.com:8080/a", "example.com:8080/a"),
        ("http://example.com", "example.com/"),
        ("http://example.com?a=1&amp;b=2", "example.com/?a=1&b=2"),
        ("http://example.com/a/?b=HTTP://X.Y/#Z", "example.com/a/?b=HTTP://X.Y/"),
        ("http://example.com/a%2fb/", "example.com/a%2fb/"),
        ("http://www.example.com/", "www.example.com/"),
        ("data:image/png;base64,AA#x", "data:image/png;base64,AA#x"),
        ("Not A URL ", "Not A URL"),
        ("ftp://Example.com/", "ftp://Example.com/"),
        ("", ""),
        (None, None),
    ],
)
def test_urls_that_lead_to_the_same_place_are_one_key(url, key):
    assert normalised_urls(text_array([url])).to_pylist() == [key]


PARTS = st.builds(
    "{}{}{}{}{}".format,
    st.sampled_from(["http://", "https://", "HTTP://", "//"]),
    st.sampled_from(["a.example", "A.Example", "ÄÖ.example", "u:P@A.b"]),
    st.sampled_from(["", ":80", ":443", ":81"]),
    st.sampled_from(["", "/", "/A b", "/a//", "/a:80"]),
    st.sampled_from(["", "?", "?Q=1#f", "#F", "?a#b#c"]),
)


@given(url=PARTS)
def test_normalising_agrees_with_the_standard_library_and_is_done_once(url):
    def by_urllib(url):
        parts = urlsplit(url)
        host = "".join(c.lower() if c.isascii() else c for c in parts.netloc).removesuffix(":80").removesuffix(":443")
        query = url.partition("#")[0].partition("?")
        return host + (parts.path or "/") + query[1] + query[2]

    (key,) = normalised_urls(text_array([url])).to_pylist()
    assert key == by_urllib(url)
    assert normalised_urls(text_array(["//" + key])).to_pylist() == [key]


def test_keys_are_text_or_whole_numbers_and_empty_ones_are_none():
    assert keys_of(pa.array([2**63 - 1, -5, None]), "none").to_pylist() == ["9223372036854775807", "-5", None]
    assert keys_of(pa.array([2**64 - 1], pa.uint64()), "none").to_pylist() == ["18446744073709551615"]
    assert keys_of(text_array(["", " ", "A"]), "none").to_pylist() == [None, " ", "A"]
    assert keys_of(text_array(["", " ", "http://A"]), "url").to_pylist() == [None, None, "a/"]


@given(keys=st.lists(st.text(max_size=6), max_size=20), partitions=st.integers(1, 50))
def test_a_key_has_one_bucket_on_every_machine(keys, partitions):
    keys = [key for key in keys if not any("\ud800" <= c <= "\udfff" for c in key)]
    assert buckets_of(text_array(keys), partitions).to_pylist() == [
        zlib.crc32(key.encode()) % partitions for key in keys
    ]


@given(groups=st.lists(st.integers(0, 30), max_size=10), task_rows=st.integers(1, 40), block_rows=st.integers(1, 10))
def test_reads_cover_every_row_once_and_no_row_group_twice(groups, task_rows, block_rows):
    spans = read_spans(groups, task_rows, block_rows)
    assert [row for span in spans for a, b in span for row in range(a, b)] == list(range(sum(groups)))
    assert all(0 < b - a <= block_rows for span in spans for a, b in span)
    borders = {sum(groups[:i]) for i in range(len(groups) + 1)}
    assert all(span[0][0] in borders and span[-1][1] in borders for span in spans)
    for span in spans:
        inside = [g for i, g in enumerate(groups) if g and span[0][0] <= sum(groups[:i]) < span[-1][1]]
        assert sum(inside) <= task_rows or len(inside) == 1
