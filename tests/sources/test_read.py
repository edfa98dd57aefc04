"""Reading: for any format, damage and types of a shard every row is accounted for. Expected values come from json, csv and plain Python."""

from __future__ import annotations

import bz2
import csv
import errno
import gzip
import io
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capsfusion_ray.config import ColumnsConfig, FilterConfig, InputConfig, SourceConfig
from capsfusion_ray.core.types import FilterReason
from capsfusion_ray.errors import ConfigError, SourceError, StorageError
from capsfusion_ray.sources import (
    ReadSpec,
    UnitRows,
    discover,
    frozen_schema,
    iter_units,
    refuse_output_in_input,
    sample,
)
from capsfusion_ray.storage import Store
from capsfusion_ray.storage.local import LocalBackend

OFF = FilterConfig()
GENERIC = SourceConfig()
LAION = SourceConfig(preset="laion_coco")


def pairs(n: int, first: int = 0) -> list[dict[str, Any]]:
    rows = range(first, first + n)
    return [{"image_url": f"u{i}", "laion_2b": f"raw ö {i}", "laion_coco": f"a photo, of “{i}”"} for i in rows]


def write_parquet(path: Path, rows: Sequence[dict[str, Any]] | pa.Table, group: int = 10, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows))
    pq.write_table(table, path, row_group_size=group, **options)
    return path


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in rows)


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def read_all(
    path: Any, source: SourceConfig = GENERIC, filter: FilterConfig = OFF, unit: int = 7
) -> tuple[list[dict[str, Any]], list[UnitRows]]:
    """Every readable row of an input in units of `unit` rows; checks that the accounting of each unit closes."""
    shards = discover(InputConfig(path=path if isinstance(path, list) else str(path)), source)
    spec = ReadSpec(frozen_schema(shards, source, filter), source, filter)
    units = []
    for shard in shards:
        if not shard.error:
            bounds = [*range(0, shard.rows, unit), shard.rows]
            ranges = [r for r in pairwise(bounds) if r[0] < r[1]]
            got = list(iter_units(shard, ranges, spec))
            assert [(u.start, u.stop) for u in got] == ranges
            units += got
    for u in units:
        lost = sum(d.stop - d.start for d in u.unreadable)
        assert u.table.num_rows + sum(u.filtered.values()) + lost == u.stop - u.start
        assert u.table.schema.remove_metadata() == spec.schema.append(pa.field("_invalid", pa.string()))
    return [row for u in units for row in u.table.to_pylist()], units


# ---------------------------------------------------------------- formats

WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "lines.json": as_jsonl,
    "a.jsonl": as_jsonl,
    "bom.jsonl": lambda rows: b"\xef\xbb\xbf" + as_jsonl(rows),
    "blank.ndjson": lambda rows: as_jsonl(rows).replace(b"\n", b"\n\n  \n"),
    "no_end.jsonl": lambda rows: as_jsonl(rows).rstrip(b"\n"),
    "crlf.jsonl": lambda rows: as_jsonl(rows).replace(b"\n", b"\r\n"),
    "a.jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows)),
    "two_members.jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows[:9])) + gzip.compress(as_jsonl(rows[9:])),
    "a.jsonl.bz2": lambda rows: bz2.compress(as_jsonl(rows)),
    "a.json.zst": lambda rows: pa.compress(json.dumps(rows).encode(), "zstd", asbytes=True),
    "a.csv": as_csv,
    "a.csv.gz": lambda rows: gzip.compress(as_csv(rows)),
    "a.tsv": lambda rows: as_csv(rows, "\t"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows_as_parquet(name: str, tmp_path: Path) -> None:
    rows = pairs(40)
    rows[3]["laion_2b"] = 'quoted "word", and\ttab' if "tsv" not in name else 'quoted "word"'
    if "tsv" not in name:
        rows[5]["laion_coco"] = "two\nlines"
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / name).write_bytes(WRITERS[name](rows))
    write_parquet(tmp_path / "p/a.parquet", rows)
    got, expected = read_all(tmp_path / "x")[0], read_all(tmp_path / "p")[0]
    assert [r.pop("row_id") for r in got] == [f"{name}:{i}" for i in range(40)]
    assert [r.pop("row_id") for r in expected] == [f"a.parquet:{i}" for i in range(40)]
    assert got == expected == [{**r, "_invalid": None} for r in rows]


def test_a_broken_line_costs_one_row_and_moves_no_row_number(tmp_path: Path) -> None:
    lines = as_jsonl(pairs(5)).splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(lines[0] + b'{"laion_2b": "cut\n' + lines[2] + b"[1]\n" + lines[4])
    got, _ = read_all(tmp_path)
    assert [r["_invalid"] for r in got] == [None, "json", None, "json", None]
    assert [(r["row_id"], r["laion_2b"]) for r in got][3:] == [("a.jsonl:3", None), ("a.jsonl:4", "raw ö 4")]


def test_a_csv_row_with_too_few_fields_is_one_broken_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("raw,synthetic\na,b\nc\nd,e\n")
    got, _ = read_all(tmp_path)
    assert [(r["laion_2b"], r["_invalid"]) for r in got] == [("a", None), (None, "csv"), ("d", None)]


def test_a_carriage_return_in_a_csv_field_costs_that_row_alone(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\n\nraw,synthetic\na,b\nc\rc,d\ne,f\n")
    got, _ = read_all(tmp_path)
    assert [(r["laion_2b"], r["_invalid"]) for r in got] == [("a", None), (None, "csv"), ("e", None)]
    (tmp_path / "a.csv").write_bytes(b"raw\rraw,synthetic\na,b\n")
    [shard] = discover(InputConfig(path=str(tmp_path)), GENERIC)
    assert shard.error == "ValueError: its header cannot be parsed"


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz"])
def test_a_mounted_file_system_that_fails_is_an_error_to_retry_and_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Unreadable rows are committed as such and never read again, so a mount that was gone for a minute must not make any."""

    class Away(io.FileIO):
        def read(self, n: int | None = -1) -> bytes:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def away(*_: Any) -> pa.NativeFile:
        return pa.PythonFile(Away(tmp_path / name), mode="r")

    if name.endswith("parquet"):
        write_parquet(tmp_path / name, pairs(20))
    else:
        (tmp_path / name).write_bytes(WRITERS[name](pairs(20)))
    config = InputConfig(path=str(tmp_path))
    [shard] = discover(config, GENERIC)
    spec = ReadSpec(frozen_schema([shard], GENERIC, OFF), GENERIC, OFF)
    monkeypatch.setattr(LocalBackend, "open_input", away)
    with pytest.raises(StorageError, match=f"{name}.*Stale file handle"):
        list(iter_units(shard, [(0, 20)], spec))
    with pytest.raises(StorageError, match=f"{name}.*Stale file handle"):
        discover(config, GENERIC)


def test_a_stray_quote_in_tsv_swallows_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('raw\tsynthetic\n"Best chair\tb\nc\td\n')
    assert [r["laion_2b"] for r in read_all(tmp_path)[0]] == ['"Best chair', "c"]


def test_a_caption_of_a_megabyte_is_read_from_every_format(tmp_path: Path) -> None:
    rows = pairs(3)
    rows[1]["laion_2b"] = "x" * 1_000_000
    for name in ("a.json", "a.jsonl", "a.csv", "a.tsv"):
        (tmp_path / name).write_bytes(WRITERS[name](rows))
    write_parquet(tmp_path / "a.parquet", rows)
    got, _ = read_all(tmp_path)
    assert [len(r["laion_2b"]) for r in got] == [7, 1_000_000, 7] * 5


text = st.text(st.characters(codec="utf-8"), max_size=20)
captions = st.lists(st.tuples(st.none() | text, st.none() | text), min_size=1, max_size=30)


@given(rows=captions, unit=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_any_captions_come_back_whatever_the_unit_size(
    rows: list[tuple[str | None, str | None]], unit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    records = [{"raw": a, "synthetic": b} for a, b in rows]
    (folder / "a.json").write_text(json.dumps(records), "utf-8")
    (folder / "b.jsonl").write_bytes(as_jsonl(records))
    schema = pa.schema({"raw": pa.string(), "synthetic": pa.string()})
    write_parquet(folder / "c.parquet", pa.Table.from_pylist(records, schema=schema), group=4)
    got, _ = read_all(folder, unit=unit)
    assert [(r["laion_2b"], r["laion_coco"]) for r in got] == rows * 3
    assert len({r["row_id"] for r in got}) == len(rows) * 3


# ---------------------------------------------------------------- finding shards


def test_unreadable_shards_are_named_and_the_others_are_read(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "whole.parquet", pairs(30)).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-100])
    (tmp_path / "zero.parquet").write_bytes(b"")
    (tmp_path / "html.parquet").write_bytes(b"<html>404 not found</html>")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(as_jsonl(pairs(500)))[:-40])
    (tmp_path / "cut.json").write_bytes(json.dumps(pairs(30)).encode()[:-50])
    (tmp_path / "gone.parquet").symlink_to(tmp_path / "nowhere")
    shards = discover(InputConfig(path=str(tmp_path)), GENERIC)
    assert {s.path for s in shards if not s.error} == {"whole.parquet"}
    assert {s.path for s in shards if s.error} == {
        "cut.parquet",
        "zero.parquet",
        "html.parquet",
        "cut.jsonl.gz",
        "cut.json",
        "gone.parquet",
    }
    assert len(read_all(tmp_path)[0]) == 30


def test_folders_leave_out_hidden_underscored_and_foreign_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_parquet(tmp_path / "b/c/a.parquet", pairs(1))
    write_parquet(tmp_path / "_temporary/a.parquet", pairs(1))
    for name in ("_SUCCESS", ".a.parquet.crc", "README.md", "notes.txt"):
        (tmp_path / name).write_text("x")
    with caplog.at_level(logging.INFO):
        assert [s.path for s in discover(InputConfig(path=str(tmp_path)), GENERIC)] == ["b/c/a.parquet"]
    assert "2 files (names starting with '_')" in caplog.text
    assert ".md" in caplog.text


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("*.parquet", ["x.parquet"]),
        ("d*/*.parquet", ["d1/x.parquet", "d2/x.parquet"]),
        ("**/*.parquet", ["d1/e/x.parquet", "d1/x.parquet", "d2/x.parquet", "x.parquet"]),
        ("d[2-9]/?.parquet", ["d2/x.parquet"]),
    ],
)
def test_globs_match_as_in_a_shell(glob: str, found: list[str], tmp_path: Path) -> None:
    for name in ("x", "d1/x", "d2/x", "d1/e/x"):
        write_parquet(tmp_path / f"{name}.parquet", pairs(1))
    assert [s.path for s in discover(InputConfig(path=f"{tmp_path}/{glob}"), GENERIC)] == found


def test_shards_of_one_name_in_two_folders_have_different_ids_and_those_of_the_first_folder_stay(
    tmp_path: Path,
) -> None:
    for folder in ("a/part", "b/part", "c"):
        write_parquet(tmp_path / folder / "x.parquet", pairs(1))
    a, b, c = (str(tmp_path / f) for f in ("a/part", "b/part", "c"))
    alone = [s.path for s in discover(InputConfig(path=a), GENERIC)]
    two = [s.path for s in discover(InputConfig(path=[a, c]), GENERIC)]
    three = [s.path for s in discover(InputConfig(path=[a, c, b]), GENERIC)]
    assert alone == ["x.parquet"]
    assert two == [*alone, "c/x.parquet"]
    assert three == [*two, "part/x.parquet"]


def test_a_file_that_two_paths_match_is_one_shard(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", pairs(1))
    assert len(discover(InputConfig(path=[str(tmp_path), str(file), f"{tmp_path}/*"]), GENERIC)) == 1


def test_nothing_found_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / "*.parquet"):
        with pytest.raises(SourceError, match=r"no csv, .*parquet"):
            discover(InputConfig(path=str(path)), GENERIC)


def test_the_format_of_a_file_without_extension_comes_from_its_first_byte_or_the_config(tmp_path: Path) -> None:
    data = write_parquet(tmp_path / "x.parquet", pairs(2)).read_bytes()
    (tmp_path / "named").write_bytes(data)
    assert discover(InputConfig(path=str(tmp_path / "named")), GENERIC)[0].rows == 2
    (tmp_path / "table").write_bytes(as_csv(pairs(2)))
    with pytest.raises(SourceError, match=r"source\.format"):
        discover(InputConfig(path=str(tmp_path / "table")), GENERIC)
    assert discover(InputConfig(path=str(tmp_path / "table")), SourceConfig(format="csv"))[0].rows == 2


def test_the_content_key_follows_bytes_not_time_stamps(tmp_path: Path) -> None:
    def key() -> str:
        return discover(InputConfig(path=str(tmp_path)), GENERIC)[0].content_key

    file = write_parquet(tmp_path / "x.parquet", pairs(50))
    before = key()
    os.utime(file, (1, 1))
    assert key() == before
    write_parquet(file, pairs(50, first=1))
    assert key() != before


def test_s3_reads_like_a_folder_and_its_key_is_the_etag(
    bucket: str, s3_options: dict[str, str], s3_client: Any, tmp_path: Path
) -> None:
    file = write_parquet(tmp_path / "x.parquet", pairs(30))
    s3_client.upload_file(str(file), bucket, "in/deep/x.parquet")
    s3_client.put_object(Bucket=bucket, Key="in/l.jsonl.gz", Body=gzip.compress(as_jsonl(pairs(30))))
    for path, expected in (
        (f"s3://{bucket}/in", ["deep/x.parquet", "l.jsonl.gz"]),
        (f"s3://{bucket}/in/*.gz", ["l.jsonl.gz"]),
        (f"s3://{bucket}/in/l.jsonl.gz", ["l.jsonl.gz"]),
    ):
        shards = discover(InputConfig(path=path, storage=s3_options), GENERIC)
        assert [s.path for s in shards] == expected
        etags = {k: s3_client.head_object(Bucket=bucket, Key=f"in/{k}")["ETag"].strip('"') for k in expected}
        assert [s.content_key for s in shards] == list(etags.values())
        spec = ReadSpec(frozen_schema(shards, GENERIC, OFF), GENERIC, OFF, s3_options)
        for shard in shards:
            units = list(iter_units(shard, [(0, 11), (11, 30)], spec))
            assert [r["laion_2b"] for u in units for r in u.table.to_pylist()] == [r["laion_2b"] for r in pairs(30)]


# ---------------------------------------------------------------- damage while reading


def damage_page(path: Path, group: int, column: int) -> None:
    """Overwrite the middle of one column chunk; the footer is not changed."""
    chunk = pq.read_metadata(path).row_group(group).column(column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    for i in range(start + 8, start + chunk.total_compressed_size):
        data[i] ^= 0xFF
    path.write_bytes(data)


def test_a_damaged_row_group_is_named_and_its_neighbours_are_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", pairs(40), compression="zstd")
    damage_page(path, group=1, column=1)
    got, units = read_all(tmp_path, unit=8)
    assert [r["row_id"] for r in got] == [f"x.parquet:{i}" for i in range(40) if not 10 <= i < 20]
    lost = [(d.start, d.stop) for u in units for d in u.unreadable]
    assert lost == [(10, 16), (16, 20)]
    assert "row group 1" in units[1].unreadable[0].error


def test_a_flipped_bit_is_found_by_page_checksums(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "x.parquet", pairs(40), compression="none", use_dictionary=False, write_page_checksum=True
    )
    data = path.read_bytes()
    assert data.count("raw ö 25".encode()) >= 1
    path.write_bytes(data.replace("raw ö 25".encode(), "raw ö 99".encode(), 1))
    _, units = read_all(tmp_path, unit=10)
    assert [(d.start, d.stop) for u in units for d in u.unreadable] == [(20, 30)]


def test_a_stream_damaged_since_the_plan_loses_only_what_follows(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(as_jsonl(pairs(20)))
    shard = discover(InputConfig(path=str(tmp_path)), GENERIC)[0]
    file.write_bytes(as_jsonl(pairs(12)))
    spec = ReadSpec(frozen_schema([shard], GENERIC, OFF), GENERIC, OFF)
    units = list(iter_units(shard, [(0, 10), (10, 20)], spec))
    assert [u.table.num_rows for u in units] == [10, 2]
    assert [(d.start, d.stop) for d in units[1].unreadable] == [(12, 20)]


def test_a_failing_store_is_an_error_to_retry_and_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFile

    url = f"memory://fail-{tmp_path.name}"
    Store(url).put("x.parquet", write_parquet(tmp_path / "x.parquet", pairs(40)).read_bytes())
    shard = discover(InputConfig(path=url), GENERIC)[0]
    spec = ReadSpec(frozen_schema([shard], GENERIC, OFF), GENERIC, OFF)

    def reset(self: MemoryFile, size: int = -1) -> bytes:
        raise ConnectionResetError("by peer")

    monkeypatch.setattr(MemoryFile, "read", reset, raising=False)
    with pytest.raises(StorageError, match="by peer"):
        list(iter_units(shard, [(0, 40)], spec))


def test_a_shard_deleted_since_the_plan_is_named(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", pairs(4))
    shard = discover(InputConfig(path=str(tmp_path)), GENERIC)[0]
    spec = ReadSpec(frozen_schema([shard], GENERIC, OFF), GENERIC, OFF)
    file.unlink()
    with pytest.raises(SourceError, match=r"x\.parquet.*gone"):
        list(iter_units(shard, [(0, 4)], spec))


@pytest.mark.parametrize("where", ["parquet", "jsonl", "csv"])
def test_captions_that_are_not_utf8_are_repaired_and_flagged(where: str, tmp_path: Path) -> None:
    bad, good = b"caf\xe9 \xff", "café".encode()
    if where == "parquet":
        raw = pa.array([good, bad, None, good], pa.binary()).view(pa.string())
        write_parquet(tmp_path / "a.parquet", pa.table({"raw": raw, "synthetic": ["s"] * 4}))
    elif where == "jsonl":
        lines = [b'{"raw":"%s","synthetic":"s"}' % v for v in (good, bad)]
        lines += [b'{"raw":null,"synthetic":"s"}', b'{"raw":"%s","synthetic":"s"}' % good]
        (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    else:
        (tmp_path / "a.csv").write_bytes(b"raw,synthetic\n%s,s\n%s,s\n,s\n%s,s\n" % (good, bad, good))
    got, _ = read_all(tmp_path)
    assert [r["_invalid"] for r in got] == [None, "laion_2b", None, None]
    assert [r["laion_2b"] for r in got] == ["café", "caf� �", "" if where == "csv" else None, "café"]


def test_a_lone_surrogate_escape_in_json_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        '[{"raw": "x\\ud800", "synthetic": "s"}, {"raw": "\\ud83d\\ude00", "synthetic": "s"}]'
    )
    got, _ = read_all(tmp_path)
    assert [r["_invalid"] for r in got] == ["laion_2b", None]
    assert got[1]["laion_2b"] == "😀"


def test_a_replacement_character_of_the_file_itself_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"raw":"a�","synthetic":"s"}\n{"raw":"b"'.encode() + b',"synthetic":"\xff"}\n')
    assert [r["_invalid"] for r in read_all(tmp_path)[0]] == [None, "laion_coco"]


# ---------------------------------------------------------------- columns and types


def laion(n: int, **columns: pa.Array) -> pa.Table:
    table = {"URL": [f"u{i}" for i in range(n)], "TEXT": ["some raw words"] * n, "top_caption": ["a photo"] * n}
    return pa.table({**table, **columns})


@pytest.mark.parametrize(
    ("seen", "frozen", "values"),
    [
        ([pa.int32(), pa.int64()], pa.int64(), [1, 1]),
        ([pa.int32(), pa.int64(), pa.float64()], pa.float64(), [1.0, 1.0, 1.0]),
        ([pa.float32(), pa.int16()], pa.float64(), [1.0, 1.0]),
        ([pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())], pa.string(), ["1"] * 3),
        ([pa.string(), pa.int64()], pa.string(), ["1", "1"]),
        ([pa.bool_(), pa.bool_()], pa.bool_(), [True, True]),
        ([pa.null(), pa.int32()], pa.int64(), [None, 1]),
        ([pa.list_(pa.string())], pa.list_(pa.string()), [["1"]]),
    ],
    ids=str,
)
def test_different_types_in_several_shards_become_one_frozen_type(
    seen: list[pa.DataType], frozen: pa.DataType, values: list[Any], tmp_path: Path
) -> None:
    for i, type in enumerate(seen):
        plain = pa.array([["1"]]) if pa.types.is_list(type) else pa.array(["1"])
        if pa.types.is_boolean(type):
            plain = pa.array([True])
        column = pa.nulls(1) if pa.types.is_null(type) else plain.cast(type)
        write_parquet(tmp_path / f"{i}.parquet", laion(1, WIDTH=column))
    got, units = read_all(tmp_path, LAION)
    assert units[0].table.schema.field("WIDTH").type == frozen
    assert [r["WIDTH"] for r in got] == values


def test_lists_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", laion(1, all=pa.array([["x"]])))
    write_parquet(tmp_path / "b.parquet", laion(1, all=pa.array(["x"])))
    with pytest.raises(SourceError, match=r"'all'.*a\.parquet.*b\.parquet"):
        read_all(tmp_path, SourceConfig(preset="laion_coco", passthrough=["all"]))


def test_a_bad_passthrough_cell_becomes_null_and_the_row_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_parquet(tmp_path / "a.parquet", laion(2, WIDTH=pa.array([1, 2])))
    shards = discover(InputConfig(path=str(tmp_path)), LAION)
    spec = ReadSpec(frozen_schema(shards, LAION, OFF), LAION, OFF)
    write_parquet(tmp_path / "b.parquet", laion(3, WIDTH=pa.array(["7", "wide", None])))  # a shard that came later
    late = discover(InputConfig(path=str(tmp_path / "b.parquet")), LAION)[0]
    unit = next(iter_units(late, [(0, 3)], spec))
    assert unit.table["WIDTH"].to_pylist() == [7, None, None]
    assert unit.table["_invalid"].null_count == 3


def test_a_missing_column_is_named_with_the_shard_and_what_it_has(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", laion(1))
    write_parquet(tmp_path / "sub/b.parquet", laion(1).drop_columns(["top_caption"]))
    with pytest.raises(SourceError, match=r"sub/b\.parquet.*'top_caption'.*it has: URL, TEXT.*join the two"):
        read_all(tmp_path, LAION)


def test_a_mistyped_column_is_named_with_the_nearest_and_a_wrong_preset_with_the_right_one(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", pairs(1))
    with pytest.raises(
        SourceError, match=r"'laion_2', which source\.columns\.raw names; it has: .*; did you mean laion_2b\?"
    ):
        read_all(tmp_path, SourceConfig(columns=ColumnsConfig(raw="laion_2")))
    with pytest.raises(SourceError, match=r"now laion_coco; capsfusion_120m and .*generic would do") as caught:
        read_all(tmp_path, LAION)
    assert "join the two" not in str(caught.value), "both captions are there"


def test_a_missing_filter_column_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", laion(1))
    with pytest.raises(SourceError, match=r"a\.parquet.*'punsafe'.*filter"):
        read_all(tmp_path, LAION, FilterConfig(max_punsafe=0.5))


def test_the_published_example_and_its_misspelling_become_reference(tmp_path: Path) -> None:
    rows = [{"laion_2b": "r", "laion_coco": "s", "capsfuion_official": "f"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert read_all(tmp_path, SourceConfig(preset="example_json"))[0] == [
        {
            "image_url": None,
            "laion_2b": "r",
            "laion_coco": "s",
            "row_id": "a.json:0",
            "reference": "f",
            "_invalid": None,
        }
    ]


def test_an_explicit_map_wins_over_the_preset(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"laion_2b": "no", "mine": "yes", "laion_coco": "s"}])
    source = SourceConfig(columns=ColumnsConfig(raw="mine"), passthrough=["mine"])
    row = read_all(tmp_path, source)[0][0]
    assert (row["laion_2b"], row["mine"]) == ("yes", "yes")


@pytest.mark.parametrize("name", ["capsfusion", "row_id", "laion_2b", "reference", "_invalid"])
def test_a_passthrough_column_with_a_name_of_the_output_is_refused(name: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", pairs(1))
    with pytest.raises(SourceError, match=name):
        read_all(tmp_path, SourceConfig(passthrough=[name]))


def test_a_preset_column_that_some_shards_lack_is_null_there(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", laion(1, hash=pa.array([5])))
    write_parquet(tmp_path / "b.parquet", laion(1))
    assert [r["hash"] for r in read_all(tmp_path, LAION)[0]] == [5, None]


# ---------------------------------------------------------------- filters


@given(
    cells=st.lists(
        st.tuples(
            st.none() | st.floats(0, 1) | st.just(math.nan),
            st.none() | st.sampled_from(["", " ", "a", "a b c", "文字"]),
        ),
        min_size=1,
        max_size=30,
    )
)
@settings(max_examples=40, deadline=None)
def test_filters_count_each_row_once_at_its_first_reason(
    cells: list[tuple[float | None, str | None]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("filter")
    columns = {
        "TEXT": pa.array([c for _, c in cells], pa.string()),
        "punsafe": pa.array([p for p, _ in cells], pa.float32()),
    }
    write_parquet(folder / "a.parquet", laion(len(cells), **columns))
    kept, expected = [], {FilterReason.PUNSAFE: 0, FilterReason.FEW_WORDS: 0, FilterReason.FEW_CHARACTERS: 0}
    for i, (punsafe, caption) in enumerate(
        zip(columns["punsafe"].to_pylist(), columns["TEXT"].to_pylist(), strict=True)
    ):
        if punsafe is not None and punsafe >= 0.5:
            expected[FilterReason.PUNSAFE] += 1
        elif caption is not None and len(caption.split()) < 1:
            expected[FilterReason.FEW_WORDS] += 1
        elif caption is not None and len(caption.strip()) < 2:
            expected[FilterReason.FEW_CHARACTERS] += 1
        else:
            kept.append(f"a.parquet:{i}")
    got, units = read_all(folder, LAION, FilterConfig(max_punsafe=0.5, min_words=1, min_characters=2))
    assert [r["row_id"] for r in got] == kept
    assert {r: sum(u.filtered.get(r, 0) for u in units) for r in expected} == expected


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pa.array(["0.1", "N/A", "0.9"]), pa.array(["0.1", None, "0.9"])),
        (pa.array([0.1, None, 0.9]), pa.array(["0.1", "N/A", "0.9"])),
        (pa.array([Decimal("0.1"), None, Decimal("0.9")]), pa.array([0.1, math.nan, 0.9])),
    ],
    ids=["text", "float and text", "decimal and float"],
)
def test_a_passthrough_column_that_is_not_float_filters_as_a_float_column_does(
    first: pa.Array, second: pa.Array, tmp_path: Path
) -> None:
    """One cell that is no number makes the column text in the whole input; the filter keeps the row of that cell."""
    for name, column in (("a", first), ("b", second)):
        write_parquet(tmp_path / f"{name}.parquet", laion(3, punsafe=column))
    got, units = read_all(tmp_path, LAION, FilterConfig(max_punsafe=0.5))
    assert [r["row_id"] for r in got] == ["a.parquet:0", "a.parquet:1", "b.parquet:0", "b.parquet:1"]
    assert "punsafe" in got[0]
    assert sum(u.filtered[FilterReason.PUNSAFE] for u in units) == 2


def test_a_filter_column_that_is_null_in_all_shards_leaves_nothing_out(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", laion(2, punsafe=pa.nulls(2)))
    assert len(read_all(tmp_path, LAION, FilterConfig(max_punsafe=0.5))[0]) == 2


def test_a_filter_column_without_passthrough_is_not_in_the_output(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", laion(2, similarity=pa.array(["0.1", "0.9"])))
    source = SourceConfig(preset="laion_coco", passthrough=[])
    got, _ = read_all(tmp_path, source, FilterConfig(min_similarity=0.3))
    assert [r["row_id"] for r in got] == ["a.parquet:1"]
    assert "similarity" not in got[0]


# ---------------------------------------------------------------- cost


def test_a_row_group_is_decoded_once_for_all_its_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", pairs(30_000), group=30_000)
    calls = []
    original = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *a, **k: (calls.append(k), original(*a, **k))[1])
    assert len(read_all(tmp_path, unit=1000)[0]) == 30_000
    assert len(calls) == 1


def test_ranges_with_gaps_and_out_of_one_row_group_give_exactly_their_rows(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", pairs(100), group=30)
    (tmp_path / "b.jsonl").write_bytes(as_jsonl(pairs(100)))
    for shard in discover(InputConfig(path=str(tmp_path)), GENERIC):
        spec = ReadSpec(frozen_schema([shard], GENERIC, OFF), GENERIC, OFF)
        units = list(iter_units(shard, [(3, 5), (29, 31), (88, 95)], spec))
        ids = [i for u in units for i in u.table["row_id"].to_pylist()]
        assert ids == [f"{shard.path}:{i}" for i in (3, 4, 29, 30, *range(88, 95))]


def test_the_sample_is_the_same_every_time_and_spread_over_shards(tmp_path: Path) -> None:
    for i in range(5):
        write_parquet(tmp_path / f"{i}.parquet", pairs(50, first=100 * i))
    shards = discover(InputConfig(path=str(tmp_path)), GENERIC)
    spec = ReadSpec(frozen_schema(shards, GENERIC, OFF), GENERIC, OFF)
    ids = sample(shards, 10, spec)["row_id"].to_pylist()
    assert ids == sample(shards, 10, spec)["row_id"].to_pylist()
    assert {i.split(":")[0] for i in ids} == {f"{i}.parquet" for i in range(5)}
    assert len(ids) == 10


# ---------------------------------------------------------------- the output is never the input

INSIDE = [
    ("in", "in"),
    ("in", "in/fused"),
    ("in/", "in/a/b"),
    ("in/**/*.parquet", "in/fused"),
    ("in/*/*/*/*.parquet", "in/fused"),
    ("in/*/*.parquet", "in/fused"),  # a paired table has its files at its root
    ("s3://bucket/in", "s3://bucket/in/fused"),
    ("s3://bucket", "s3://bucket/fused"),
]
BESIDE = [
    ("in", "in2"),
    ("in", "out"),
    ("in/*.parquet", "in/fused"),  # the files of the output lie deeper
    ("in/f*", "in/fused"),
    ("*.csv", "out/fused"),
    ("in/a.parquet", "in/fused"),
    ("s3://bucket/in", "s3://bucket/in2"),
    ("s3://bucket/in", "s3://other/in/fused"),
]


@pytest.mark.parametrize(("given", "output"), INSIDE)
def test_an_output_inside_its_input_is_refused(given: str, output: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"output\.path=.*input\.path=.*not inside the input"):
        refuse_output_in_input([given], "input.path", output)


@pytest.mark.parametrize(("given", "output"), BESIDE)
def test_an_output_beside_its_input_is_not(given: str, output: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    refuse_output_in_input([given], "input.path", output)


def test_a_link_does_not_hide_that_the_output_is_inside(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(ConfigError):
        refuse_output_in_input([str(tmp_path / "in")], "input.path", str(tmp_path / "link" / "out"))
