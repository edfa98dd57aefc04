"""Rows taken out of an output: gone from every file, counted, and the accounting closes wherever it was killed."""

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outputs import DiesAt, run_of, units_of

from capsfusion_ray import takedown as takedown_module
from capsfusion_ray.config import OutputConfig, VerifyConfig
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.manifest import read_manifest
from capsfusion_ray.rewrite import sweep
from capsfusion_ray.storage import Store
from capsfusion_ray.takedown import TakedownConfig, takedown
from capsfusion_ray.verify import verify

OUTCOMES = ["fused", "rejected", "kept", "fused", "fused"]
ROWS = [f"s{shard}.parquet:{row}" for shard in range(2) for row in range(20) if row // 5 % 2 == shard]  # see units_of


def finished(path, partition_by="shard"):
    output = OutputConfig(str(path), target_file_rows=4, partition_by=partition_by)
    run_of(Store(output.path), units_of(4, 5), OUTCOMES, output)
    return output


def row_ids(path):
    found = []
    for folder in ("data", "rejected"):
        if (path / folder).is_dir():
            found += [i for file in (path / folder).rglob("*.parquet") for i in pq.read_table(file, partitioning=None)["row_id"].to_pylist()]
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
    assert all(p.read_bytes() == data for p, data in untouched.items()), "files without such a row stay as they are"
    totals = verify(VerifyConfig(output, deep=True))
    assert totals["rows"]["removed"] == len(gone)


def ids_of(file):
    return set(pq.read_table(file, partitioning=None)["row_id"].to_pylist())


def test_killed_at_every_write_and_repeated_it_closes(tmp_path, monkeypatch):
    """Including the manifest's and the deletions after it."""
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


def test_by_url_and_by_a_columns_value(tmp_path):
    output = finished(tmp_path / "out")
    assert takedown(TakedownConfig(output, urls=listed(tmp_path / "urls", ["u3"])))["removed"] == 4, "one of each unit"
    assert "u3" not in ds.dataset(tmp_path / "out" / "data").to_table()["image_url"].to_pylist()
    with pytest.raises(ConfigError, match=r"punsafe is no column of this output; it has \['lang'\]"):
        takedown(TakedownConfig(output, above={"punsafe": 0.5}))
    with pytest.raises(ConfigError, match="nothing to take down"):
        TakedownConfig(output)
    verify(VerifyConfig(output, deep=True))


def test_another_takedown_waits_for_the_one_that_was_killed(tmp_path, monkeypatch):
    output = finished(tmp_path / "out")
    monkeypatch.setattr(takedown_module, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        takedown(TakedownConfig(output, row_ids=listed(tmp_path / "a", ["s0.parquet:0"])))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="a takedown was begun and not finished"):
        takedown(TakedownConfig(output, row_ids=listed(tmp_path / "b", ["s0.parquet:1"])))
    assert takedown(TakedownConfig(output, row_ids=str(tmp_path / "a")))["removed"] == 1
    assert read_manifest(Store(output.path)).revisions[-1]["kind"] == "takedown"


def test_the_sweep_leaves_what_may_be_written_this_moment(tmp_path):
    """A driver that lost its lease may be compacting: its files have no entry yet, and its entry will name them."""
    output = finished(tmp_path / "out")
    for name in ("data/shard=g00007/part-r002-00000.parquet", "data/lang=en/part-r002-g00007-00000.parquet", "data/notes.txt"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(b"")
    stale = tmp_path / "out" / "data/shard=g00000/part-r001-00099.parquet"
    stale.write_bytes(b"")
    assert sweep(Store(output.path), read_manifest(Store(output.path))) == 1
    assert not stale.exists()
    assert (tmp_path / "out" / "data/shard=g00007/part-r002-00000.parquet").exists()
