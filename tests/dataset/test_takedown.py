"""Rows are taken down: they are in no file, they are counted, and the accounting closes wherever the process was killed."""

import gzip
import shutil
from pathlib import Path

import echo_run
import outputs
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outputs import DiesAt, flip_a_bit, run_of, units_of

from capsfusion_ray.config import FilterConfig, OutputConfig, VerifyConfig
from capsfusion_ray.dataset import takedown as takedown_module
from capsfusion_ray.dataset.edit_record import refuse_unfinished_edit
from capsfusion_ray.dataset.editions import sweep
from capsfusion_ray.dataset.layout import COMPARISON, REPORT, RETRY_DIR
from capsfusion_ray.dataset.manifest import read_manifest
from capsfusion_ray.dataset.takedown import takedown
from capsfusion_ray.dataset.takedown_criteria import TakedownConfig
from capsfusion_ray.dataset.verify import verify
from capsfusion_ray.errors import AccountingError, ConfigError, SourceError
from capsfusion_ray.reports.job import ReportConfig, report
from capsfusion_ray.storage import Store

OUTCOMES = ["fused", "rejected", "kept", "fused", "fused"]
ROWS = [
    f"s{shard}.parquet:{row}" for shard in range(2) for row in range(20) if row // 5 % 2 == shard
]  # as units_of cuts them


def finished(path, partition_by="shard"):
    output = OutputConfig(str(path), target_file_rows=4, partition_by=partition_by)
    run_of(Store(output.path), units_of(4, 5), OUTCOMES, output)
    return output


def row_ids(path):
    found = []
    for folder in ("data", "rejected"):
        if (path / folder).is_dir():
            found += [
                i
                for file in (path / folder).rglob("*.parquet")
                for i in pq.read_table(file, partitioning=None)["row_id"].to_pylist()
            ]
    return sorted(found)


def listed(path, ids):
    path.write_text("\n".join(ids) + "\n")
    return str(path)


@settings(max_examples=15)
@given(gone=st.sets(st.sampled_from(ROWS), min_size=1), partition_by=st.sampled_from(["shard", "lang"]))
def test_any_rows_are_removed_and_no_other(tmp_path_factory, gone, partition_by):
    path = tmp_path_factory.mktemp("t")
    output = finished(path / "out", partition_by)
    before = row_ids(path / "out")
    assert before == sorted(ROWS)
    untouched = {p: p.read_bytes() for p in (path / "out" / "data").rglob("*.parquet") if not gone & ids_of(p)}
    assert takedown(TakedownConfig(output, row_ids=listed(path / "ids", gone)))["removed"] == len(gone)
    assert row_ids(path / "out") == sorted(set(before) - gone)
    assert all(p.read_bytes() == data for p, data in untouched.items()), "files without such a row are unchanged"
    totals = verify(VerifyConfig(output, deep=True))
    assert totals["rows"]["removed"] == len(gone)


def ids_of(file):
    return set(pq.read_table(file, partitioning=None)["row_id"].to_pylist())


def test_killed_at_every_write_and_repeated_it_closes(tmp_path, monkeypatch):
    """At each write, at that of the manifest and at each deletion after it."""
    ids = listed(tmp_path / "ids", ["s0.parquet:0", "s0.parquet:1", "s1.parquet:7"])
    kills = 0
    for at in range(1, 40):
        output = finished(tmp_path / f"out{at}")
        monkeypatch.setattr(takedown_module, "Store", lambda root, options, at=at: DiesAt(Store(root, options), at))
        try:
            takedown(TakedownConfig(output, row_ids=ids))
        except KeyboardInterrupt:
            kills += 1
        else:
            break
        finally:
            monkeypatch.setattr(takedown_module, "Store", Store)
        takedown(TakedownConfig(output, row_ids=ids, takeover=True))
        assert verify(VerifyConfig(output, deep=True))["rows"]["removed"] == 3
        assert len(row_ids(tmp_path / f"out{at}")) == len(ROWS) - 3
    assert kills > 8


def test_a_damaged_file_is_refused_before_the_takedown_begins(tmp_path):
    output = finished(tmp_path / "out")
    bad = flip_a_bit(tmp_path / "out" / "data")
    with pytest.raises(AccountingError, match=rf"1 files are damaged \(first .*{bad.name}: checksum .*repair=true"):
        takedown(TakedownConfig(output, urls=listed(tmp_path / "urls", ["u3"])))
    refuse_unfinished_edit(
        Store(output.path), read_manifest(Store(output.path))
    )  # no edit is unfinished, so a repair may begin
    flip_a_bit(tmp_path / "out" / "data")
    assert takedown(TakedownConfig(output, urls=listed(tmp_path / "urls", ["u3"])))["removed"] == 4


def test_by_url_and_by_a_columns_value(tmp_path):
    output = finished(tmp_path / "out")
    assert takedown(TakedownConfig(output, urls=listed(tmp_path / "urls", ["u3"])))["removed"] == 4, "one of each unit"
    assert "u3" not in ds.dataset(tmp_path / "out" / "data").to_table()["image_url"].to_pylist()
    with pytest.raises(ConfigError, match=r"above: punsafe is no column of this output; its columns are \['lang'\]"):
        takedown(TakedownConfig(output, above={"punsafe": 0.5}))
    with pytest.raises(ConfigError, match="nothing to take down"):
        TakedownConfig(output)
    verify(VerifyConfig(output, deep=True))


@pytest.mark.parametrize(
    "written",
    [
        lambda path: path.write_text("u3\nu1\n", "utf-8-sig"),  # with a byte order mark, as spreadsheets write it
        lambda path: path.write_bytes(b"  u3 \r\n\r\nu1\t\r\n"),
    ],
)
def test_lists_as_other_programs_save_them_are_read_and_lines_without_rows_are_counted(tmp_path, written, caplog):
    output = finished(tmp_path / "out")
    written(tmp_path / "urls")
    assert takedown(TakedownConfig(output, urls=str(tmp_path / "urls")))["removed"] == 8
    done = takedown(TakedownConfig(output, urls=listed(tmp_path / "more", ["u4", "u3", '"u2"'])))
    assert (done["removed"], done["not_found"]) == (4, 2)
    assert "2 of its 3 lines match no url of this output (any more)" in caplog.text
    verify(VerifyConfig(output, deep=True))


def test_an_address_that_is_stored_with_white_space_is_taken_down_too(tmp_path, monkeypatch):
    part = outputs.part_of
    monkeypatch.setattr(outputs, "part_of", lambda *args: padded(part(*args)))

    def padded(table):
        return table.set_column(0, "image_url", pa.array([f"{url} " for url in table["image_url"].to_pylist()]))

    output = finished(tmp_path / "out")
    assert takedown(TakedownConfig(output, urls=listed(tmp_path / "urls", ["u3"])))["removed"] == 4


def test_a_truncated_list_is_refused(tmp_path):
    path = tmp_path / "urls.gz"
    path.write_bytes(gzip.compress(b"u3\n" * 9999)[:-9])
    with pytest.raises(SourceError, match=f"urls={path}: cannot be read as lines of text"):
        takedown(TakedownConfig(finished(tmp_path / "out"), urls=str(path)))


NUMBERED = ("source.passthrough=[lang,punsafe]",)


@pytest.mark.parametrize(
    "asked", [{"max_punsafe": 0.5}, {"max_punsafe": 0.3, "min_words": 5}, {"min_characters": 20}], ids=str
)
@pytest.mark.parametrize("partition_by", ["shard", "lang"])
def test_a_takedown_by_filter_leaves_what_a_run_with_that_filter_leaves(tmp_path, asked, partition_by):
    """For values at the threshold, above it, and for rows without a value."""
    strict = echo_run.finished(
        tmp_path / "strict", partition_by, *NUMBERED, *(f"filter.{name}={value}" for name, value in asked.items())
    )
    echo_run.finished(tmp_path / "loose", partition_by, *NUMBERED)
    output = OutputConfig(str(tmp_path / "loose" / "out"), partition_by=partition_by)
    assert 0 < strict.counts.filtered < 24
    assert takedown(TakedownConfig(output, filter=FilterConfig(**asked)))["removed"] == strict.counts.filtered
    for folder in ("data", "rejected"):
        assert echo_run.rows_of(tmp_path / "loose", folder) == echo_run.rows_of(tmp_path / "strict", folder)
    verify(VerifyConfig(output, deep=True))


def test_a_filter_on_a_column_that_was_not_carried_along_is_refused(tmp_path):
    output = finished(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"needs a column 'punsafe', and this output has \['lang'\]"):
        takedown(TakedownConfig(output, filter=FilterConfig(max_punsafe=0.5)))


def test_by_what_is_above_and_below_a_value(tmp_path):
    echo_run.finished(tmp_path, "shard", *NUMBERED)
    output = OutputConfig(str(tmp_path / "out"))
    assert takedown(TakedownConfig(output, above={"punsafe": 0.9}, below={"punsafe": 0.1}))["removed"] == 6, (
        "0.0, 1.0 and 1.1 of both shards"
    )
    left = [row["punsafe"] for folder in ("data", "rejected") for row in echo_run.rows_of(tmp_path, folder).values()]
    assert {None, 0.1, 0.9} <= set(left)


# ------------------------------------------------------------------------------------------------------- no text is left

FUSED, REJECTED = (
    "https://example.com/a4.jpg",
    "https://example.com/a3.jpg",
)  # its raw caption is in no other row
TRACES = (FUSED, REJECTED, "Cape A No. 3")


def with_copies(path):
    """A finished output with a copy of every data file wherever a kill or another command may leave one."""
    echo_run.finished(path)
    echo_run.finished(path / "other")
    out, output = path / "out", OutputConfig(str(path / "out"))
    report(ReportConfig(output))
    report(ReportConfig(output, beside=OutputConfig(str(path / "other" / "out"))))
    for file in [*(out / "data").rglob("*.parquet"), *(out / "rejected").rglob("*.parquet")]:
        late = f"_units/{file.parent.parent.name}-{file.parent.name}-{file.name}"  # a second attempt that committed after its group was compacted
        merged = f"{RETRY_DIR}/e002/{late}"  # left by a retry that was killed after its manifest
        old = f"{file.relative_to(out).parent}/part-r001-9{file.stem[-4:]}.parquet"  # an earlier edition that is not swept yet
        torn = f"{file.relative_to(out).parent}/.{file.name}.{'0123' * 8}.tmp"  # left by a writer that was killed before its rename
        for name in (late, merged, old, torn):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(file.read_bytes())
    return output


def traces(out):
    """The top folders and files that contain a text of these rows, in Parquet or as plain text."""
    found = set()
    for file in (p for p in out.rglob("*") if p.is_file()):
        try:
            text = str(pq.read_table(file, partitioning=None).to_pylist())
        except pa.ArrowInvalid:
            text = file.read_text("utf-8", errors="replace")
        if any(trace in text for trace in TRACES):
            found.add(file.relative_to(out).parts[0])
    return found


def test_no_text_of_a_removed_row_is_left_anywhere_wherever_it_was_killed(tmp_path, monkeypatch):
    prepared = Path(with_copies(tmp_path / "prepared").path)
    urls, died, at = listed(tmp_path / "urls", [FUSED, REJECTED]), True, 0
    while died:
        at += 1
        out = tmp_path / str(at)
        shutil.copytree(prepared, out)
        output = OutputConfig(str(out))
        assert traces(out) == {"data", "rejected", "_units", RETRY_DIR, REPORT, COMPARISON}
        monkeypatch.setattr(takedown_module, "Store", lambda root, options, at=at: DiesAt(Store(root, options), at))
        try:
            takedown(TakedownConfig(output, urls=urls))
            died = False
        except KeyboardInterrupt:
            monkeypatch.setattr(takedown_module, "Store", Store)
            takedown(TakedownConfig(output, urls=urls, takeover=True))
        assert traces(out) == set()
        assert verify(VerifyConfig(output, deep=True))["rows"]["removed"] == 2
    assert at > 8


def test_another_takedown_is_refused_until_the_killed_one_is_finished(tmp_path, monkeypatch):
    output = finished(tmp_path / "out")
    monkeypatch.setattr(takedown_module, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        takedown(TakedownConfig(output, row_ids=listed(tmp_path / "a", ["s0.parquet:0"])))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="a takedown was begun and not finished"):
        takedown(TakedownConfig(output, row_ids=listed(tmp_path / "b", ["s0.parquet:1"])))
    assert takedown(TakedownConfig(output, row_ids=str(tmp_path / "a")))["removed"] == 1
    assert read_manifest(Store(output.path)).revisions[-1]["kind"] == "takedown"


def test_the_sweep_leaves_files_of_groups_without_an_entry(tmp_path):
    """A driver that lost its lease may be writing them, and its entry will name them."""
    output = finished(tmp_path / "out")
    for name in (
        "data/shard=g00007/part-r002-00000.parquet",
        "data/lang=en/part-r002-g00007-00000.parquet",
        "data/notes.txt",
    ):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(b"")
    stale = tmp_path / "out" / "data/shard=g00000/part-r001-00099.parquet"
    stale.write_bytes(b"")
    assert sweep(Store(output.path), read_manifest(Store(output.path))) == 1
    assert not stale.exists()
    assert (tmp_path / "out" / "data/shard=g00007/part-r002-00000.parquet").exists()
