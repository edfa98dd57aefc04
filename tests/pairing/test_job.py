"""The pair job on a store, without Ray: the tasks of both passes run here one after another."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capsfusion_ray.config import FilterConfig, InputConfig, SourceConfig, parse_config
from capsfusion_ray.dataset.layout import LEASE
from capsfusion_ray.dataset.lease import Lease
from capsfusion_ray.errors import AccountingError, ConfigError, SourceError
from capsfusion_ray.pairing import job as pair_module
from capsfusion_ray.pairing import ray_join as join_module
from capsfusion_ray.pairing import shuffle_files
from capsfusion_ray.pairing.config import PairConfig, PairOutputConfig, TableConfig
from capsfusion_ray.pairing.job import AUDIT, SETTINGS, pair
from capsfusion_ray.pairing.survey import survey
from capsfusion_ray.sources import ReadSpec, discover, frozen_schema, iter_units
from capsfusion_ray.storage import Store


def raw_rows(n):
    return [
        {"URL": f"http://Host.example/{i}.jpg", "TEXT": f"raw ö {i}", "hash": i * 2**40, "WIDTH": i} for i in range(n)
    ]


def synthetic_rows(n):
    return [
        {
            "url": f"https://host.example/{i}.jpg",
            "re_caption": f"a photo of {i}",
            "hash": str(i * 2**40),
            "score": i / 2,
        }
        for i in range(n)
    ]


def write(path, rows, group=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)


@pytest.fixture
def tables(tmp_path):
    """30 raw rows in two shards and 25 synthetic ones in one; 20 common keys, one of them twice in each table."""
    raw, synthetic = raw_rows(29), synthetic_rows(29)[9:] + synthetic_rows(33)[29:]
    write(tmp_path / "raw/a.parquet", raw[:20])
    write(tmp_path / "raw/b.parquet", [*raw[20:], raw[3] | {"TEXT": "another"}])
    (tmp_path / "synthetic").mkdir()
    (tmp_path / "synthetic/all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*synthetic, synthetic[0]]))
    return {"raw": TableConfig(str(tmp_path / "raw")), "synthetic": TableConfig(str(tmp_path / "synthetic"))}


def in_turn(name, tasks):
    """ray_join.outcomes without Ray."""
    for task in tasks:
        for table in task():
            yield from table["outcome"].to_pylist()


@pytest.fixture
def without_ray(monkeypatch):
    monkeypatch.setattr(join_module, "outcomes", in_turn)
    monkeypatch.setattr(join_module, "ray", SimpleNamespace(put=lambda value: value, get=lambda value: value))
    monkeypatch.setattr(pair_module.cluster, "connect", lambda _: None)
    monkeypatch.setattr(pair_module.cluster, "disconnect", lambda: None)


def as_fuse_reads_it(path):
    """Every row of a folder under source.preset=generic, without options."""
    source, off = SourceConfig(), FilterConfig()
    shards = discover(InputConfig(path=str(path)), source)
    read = ReadSpec(frozen_schema(shards, source, off), source, off)
    units = [unit for shard in shards for unit in iter_units(shard, [(0, shard.rows)], read)]
    assert not any(unit.unreadable for unit in units)
    return [row for unit in units for row in unit.table.to_pylist()]


def test_the_paired_table_is_what_the_main_job_reads(tables, tmp_path, without_ray):
    output = tmp_path / "out"
    cfg = PairConfig(**tables, output=PairOutputConfig(str(output)), normalise="url", partitions=4)
    report = pair(cfg)
    found = {row["image_url"]: (row["laion_2b"], row["laion_coco"]) for row in as_fuse_reads_it(output)}
    assert found == {f"http://Host.example/{i}.jpg": (f"raw ö {i}", f"a photo of {i}") for i in range(9, 29)}
    assert report["pairs"] == 20
    assert {k: report["raw"][k] for k in ("rows", "matched", "unmatched", "duplicates", "conflicting")} == {
        "rows": 30,
        "matched": 20,
        "unmatched": 9,
        "duplicates": 1,
        "conflicting": 1,
    }
    assert {k: report["synthetic"][k] for k in ("rows", "matched", "unmatched", "duplicates", "conflicting")} == {
        "rows": 25,
        "matched": 20,
        "unmatched": 4,
        "duplicates": 1,
        "conflicting": 0,
    }
    assert report["raw"]["columns"] == {"caption": "TEXT", "key": "URL", "url": "URL"}
    assert report["raw"]["duplicate_keys"] == ("host.example/3.jpg",)
    assert json.loads((output / AUDIT).read_text())["pairs"] == 20
    assert sorted(p.name for p in (output / "_pair").rglob("*") if p.is_file()) == ["audit.json", "settings.json"], (
        "what stood between the passes is gone"
    )


class Killed(Exception):
    pass


def killed_at_write(monkeypatch, at):
    """The write number `at` (from 1) to any store raises. Returns a list with the number of writes so far."""
    writes, put = [], Store.put

    def counted(self, path, data):
        writes.append(path)
        if len(writes) == at:
            raise Killed(path)
        put(self, path, data)

    monkeypatch.setattr(Store, "put", counted)
    return writes


def test_a_run_killed_at_any_write_is_continued_and_its_files_have_the_same_bytes(
    tables, tmp_path, without_ray, monkeypatch
):
    """Every shuffle file, every data file and every bucket's audit is written once in both runs together."""
    monkeypatch.setattr(
        shuffle_files, "FILE_ROWS", 10
    )  # seven shuffle files: row groups of 7 rows, and a text file cut at 10
    monkeypatch.setattr(pair_module, "BUCKET_ROWS", 20)  # three buckets

    def run(name):
        return pair(PairConfig(**tables, output=PairOutputConfig(str(tmp_path / name)), normalise="url"))

    def parts(name):
        return {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.parquet")}

    with monkeypatch.context() as patch:
        all_writes = killed_at_write(patch, 0)
        wanted = run("whole")
    assert len(parts("whole")) == 3
    assert len(all_writes) == len(set(all_writes)) == 7 + 3 + 3 + 1
    for at in range(1, len(all_writes) + 1):
        with monkeypatch.context() as patch:
            first = killed_at_write(patch, at)
            with pytest.raises(Killed):
                run(f"killed{at}")
        with monkeypatch.context() as patch:
            second = killed_at_write(patch, 0)
            again = run(f"killed{at}")
        assert parts(f"killed{at}") == parts("whole")
        assert {**again, "seconds": 0, "output": ""} == {**wanted, "seconds": 0, "output": ""}
        part_without_audit = [path for path in first[:-1] if path.endswith(".parquet") and path == second[0]]
        assert first[:-1] + second == all_writes or part_without_audit, (
            "nothing is done twice, but a part without its audit"
        )


def test_a_hash_that_is_a_number_in_one_table_and_text_in_the_other_is_one_key_and_passthrough_columns_are_kept(
    tables, tmp_path, without_ray
):
    raw = TableConfig(tables["raw"].path, key="hash", passthrough=["WIDTH", "hash"])
    synthetic = TableConfig(tables["synthetic"].path, key="hash", passthrough=["score"])
    report = pair(PairConfig(raw, synthetic, PairOutputConfig(str(tmp_path / "out"))))
    rows = pq.read_table(tmp_path / "out" / "part-00000.parquet").to_pylist()
    assert [list(rows[0]), report["pairs"], report["partitions"]] == [
        ["image_url", "laion_2b", "laion_coco", "WIDTH", "hash", "score"],
        20,
        1,
    ]
    assert all((row["hash"], row["score"]) == (row["WIDTH"] * 2**40, row["WIDTH"] / 2) for row in rows)
    assert [row["WIDTH"] for row in rows] == list(range(9, 29)), "in the order of the raw table"


def test_the_same_command_again_does_nothing_and_another_pairing_is_refused(tables, tmp_path, without_ray, monkeypatch):
    cfg = PairConfig(**tables, output=PairOutputConfig(str(tmp_path / "out")), normalise="url")
    first = pair(cfg)
    monkeypatch.setattr(pair_module, "run_join", None)
    assert pair(cfg)["pairs"] == first["pairs"]
    with pytest.raises(ConfigError, match="holds another pairing: normalise was 'url', now 'none'"):
        pair(PairConfig(**tables, output=cfg.output))
    write(tmp_path / "raw/c.parquet", raw_rows(3))
    with pytest.raises(ConfigError, match=r"raw\.path was"):
        pair(cfg)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"it is not empty and holds no pairing \(it has notes\.txt\)"):
        pair(PairConfig(**tables, output=PairOutputConfig(str(tmp_path / "full"))))


def test_duplicates_can_be_refused_and_then_accepted(tables, tmp_path, without_ray):
    output = PairOutputConfig(str(tmp_path / "out"))
    with pytest.raises(
        SourceError,
        match=r"raw: 1 rows \(1 with another caption\), e\.g\. \['host\.example/3\.jpg'\]; synthetic: 1 rows \(0 with",
    ):
        pair(PairConfig(**tables, output=output, normalise="url", duplicates="refuse"))
    assert not (tmp_path / "out" / AUDIT).exists()
    assert pair(PairConfig(**tables, output=output, normalise="url"))["pairs"] == 20
    assert len(as_fuse_reads_it(tmp_path / "out")) == 20
    with pytest.raises(SourceError, match="duplicates=refuse"):
        pair(PairConfig(**tables, output=output, normalise="url", duplicates="refuse"))


def test_tables_without_a_common_key_are_refused_with_examples_and_the_output_can_be_used_again(
    tables, tmp_path, without_ray
):
    cfg = PairConfig(**tables, output=PairOutputConfig(str(tmp_path / "out")))
    with pytest.raises(
        SourceError,
        match=r"no key of raw \(URL, e\.g\. \['http://Host.*\) is one of synthetic \(url, e\.g\. \['https://host.*normalise=url",
    ):
        pair(cfg)
    assert not (tmp_path / "out" / SETTINGS).exists()
    assert pair(PairConfig(**tables, output=cfg.output, normalise="url"))["pairs"] == 20


def test_damaged_rows_are_counted_for_their_table(tables, tmp_path, without_ray):
    (tmp_path / "raw/c.parquet").write_bytes(b"PAR1 no parquet")
    with (tmp_path / "synthetic/all.jsonl").open("a") as file:
        file.write('{"url": "https://host.example/1.jpg", "re_caption": \n{"url": null, "re_caption": "x"}\n')
    report = pair(PairConfig(**tables, output=PairOutputConfig(str(tmp_path / "out")), normalise="url"))
    assert list(report["raw"]["unreadable_shards"]) == ["c.parquet"]
    assert {k: report["synthetic"][k] for k in ("rows", "matched", "unusable", "without_key")} == {
        "rows": 27,
        "matched": 20,
        "unusable": 1,
        "without_key": 1,
    }


def test_keys_that_are_not_utf8_are_never_paired(tmp_path, without_ray):
    """Repaired keys would be equal, and would pair captions of different images."""
    for side, header, letter in (("raw", b"url\tTEXT", b"\xdf"), ("synthetic", b"url\tre_caption", b"\xe4")):
        (tmp_path / side).mkdir()
        lines = [header, b"https://x.example/stra" + letter + b"e.jpg\tA street", b"https://x.example/1.jpg\tA square"]
        (tmp_path / side / "a.tsv").write_bytes(b"\n".join(lines) + b"\n")
    config = PairConfig(
        TableConfig(str(tmp_path / "raw")),
        TableConfig(str(tmp_path / "synthetic")),
        PairOutputConfig(str(tmp_path / "out")),
    )
    report = pair(config)
    assert [(report[side]["matched"], report[side]["without_key"]) for side in ("raw", "synthetic")] == [(1, 1), (1, 1)]


def test_a_column_that_cannot_be_a_key_or_a_caption_is_refused_by_the_survey(tmp_path):
    write(tmp_path / "t/a.parquet", [{"hash": 0.5, "TEXT": "x", "id": 7}])
    path = str(tmp_path / "t")
    for table, normalise, message in (
        (TableConfig(path), "none", "no column is known as its key; it has hash, TEXT, id; set raw.key=NAME"),
        (TableConfig(path, key="hash"), "none", "raw.key=hash: it is double; a key must be text or integers"),
        (TableConfig(path, key="id"), "url", "raw.key=id: it is int64; normalise=url is for text"),
        (TableConfig(path, key="nope"), "none", "nope"),
        (TableConfig(path, key="id", passthrough=["laion_2b"]), "none", "'laion_2b' is a column of the output itself"),
    ):
        with pytest.raises((SourceError, ConfigError), match=message):
            survey("raw", table, normalise)
    with pytest.raises(SourceError, match="no column is known as its caption"):
        survey("synthetic", TableConfig(path, key="id"), "none")


def test_the_command_line_is_parsed_into_the_two_tables():
    cfg = parse_config(
        PairConfig,
        [
            "raw.path=a",
            "raw.key=hash",
            "synthetic.path=[b,c]",
            "synthetic.passthrough=[x]",
            "output.path=o",
            "duplicates=refuse",
        ],
    )
    assert (cfg.raw.key, cfg.synthetic.path, cfg.synthetic.passthrough, cfg.duplicates) == (
        "hash",
        ["b", "c"],
        ["x"],
        "refuse",
    )
    for wrong, message in (
        ("raw.colum=x", "raw.col"),
        ("partitions=0", "partitions=0"),
        ("raw.passthrough=[_x]", "'_x'"),
        ("duplicates=all", "duplicates"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(PairConfig, [wrong])


def test_pairing_on_any_store(store, tables, without_ray):
    """Data files, settings and audit are written through the store."""
    cfg = PairConfig(**tables, output=PairOutputConfig(store.root, store.options), normalise="url", partitions=2)
    assert pair(cfg)["pairs"] == 20
    assert [file.path for file in Store(store.root, store.options).list()] == [
        AUDIT,
        SETTINGS,
        LEASE,
        "part-00000.parquet",
        "part-00001.parquet",
    ]


@pytest.mark.parametrize(
    ("first", "second"),
    [(["hash", "WIDTH"], ["WIDTH", "hash"]), (["WIDTH", "hash"], ["WIDTH"]), (["WIDTH"], ["WIDTH", "hash"])],
)
def test_other_passthrough_columns_are_another_pairing_even_if_the_key_is_one_of_them(
    tables, tmp_path, without_ray, first, second
):
    cfg = PairConfig(**tables, output=PairOutputConfig(str(tmp_path / "out")))
    keyed = {side: replace(table, key="hash") for side, table in tables.items()}

    def carrying(names):
        return replace(cfg, **keyed | {"raw": replace(keyed["raw"], passthrough=names)})

    pair(carrying(first))
    with pytest.raises(ConfigError, match=r"raw\.passthrough was"):
        pair(carrying(second))
    assert pair(carrying(first))["pairs"]


def test_shuffle_files_that_another_driver_deleted_end_the_pairing_before_a_data_file_is_overwritten(
    tables, tmp_path, without_ray, monkeypatch
):
    """Another driver took over while the first pass waited, and deleted the files, so that the list is not complete."""
    cfg = PairConfig(**tables, output=PairOutputConfig(str(tmp_path / "out")), normalise="url")
    pair(cfg)
    parts = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.parquet")}
    (tmp_path / "out" / AUDIT).unlink()

    def then_swept(name, tasks):
        yield from in_turn(name, tasks)
        if name == "Distribute":
            min((tmp_path / "out" / "_pair" / "exchange").iterdir()).unlink()

    monkeypatch.setattr(join_module, "outcomes", then_swept)
    with pytest.raises(AccountingError, match=r"1 of .* shuffle files are gone"):
        pair(cfg)
    assert parts == {path: path.read_bytes() for path in (tmp_path / "out").glob("*.parquet")}


def test_a_second_driver_is_refused_while_one_runs(tables, tmp_path, without_ray, monkeypatch):
    monkeypatch.setattr("capsfusion_ray.dataset.lease.TTL_S", 1.0)
    cfg = PairConfig(**tables, output=PairOutputConfig(str(tmp_path / "out")), normalise="url")
    with (
        Lease(Store(str(tmp_path / "out")), ttl_s=1.0),
        pytest.raises(ConfigError, match="another driver works on this output"),
    ):
        pair(cfg)
    assert pair(cfg)["pairs"] == 20, "the lease alone does not make the folder another's"


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"caption": "TEXTT"}, r"raw\.caption=TEXTT: .*; did you mean TEXT\?"),
        ({"key": "kk"}, r"raw\.key=kk: .* has no such column; it has URL"),
        ({"url": "ulr"}, r"raw\.url=ulr"),
        ({"passthrough": ["WIDT"]}, r"raw\.passthrough=WIDT: .*; did you mean WIDTH\?"),
    ],
)
def test_a_missing_column_is_named_with_its_config_key(tables, tmp_path, without_ray, named, says):
    cfg = PairConfig(
        raw=replace(tables["raw"], **named),
        synthetic=tables["synthetic"],
        output=PairOutputConfig(str(tmp_path / "out")),
    )
    with pytest.raises(SourceError, match=says):
        pair(cfg)
