"""Parts, compaction, manifest and verify in a local folder: each row that goes in comes out once, and damage is found."""

import hashlib
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from outputs import FIELDS, OUTCOMES, DiesAt, part_of, run_of, units_of

from capsfusion_ray.config import OutputConfig, VerifyConfig
from capsfusion_ray.core.accounting import summarise
from capsfusion_ray.core.plan import Plan
from capsfusion_ray.core.unit_batch import UnitBatch
from capsfusion_ray.dataset.compaction import compact_group
from capsfusion_ray.dataset.layout import MANIFEST
from capsfusion_ray.dataset.plan_files import read_plans, write_plan
from capsfusion_ray.dataset.unit_files import commit, committed, read_summaries
from capsfusion_ray.dataset.verify import verify
from capsfusion_ray.errors import AccountingError, ConfigError
from capsfusion_ray.storage import Store


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    outcomes=st.lists(st.sampled_from(OUTCOMES), min_size=0, max_size=12),
    filtered=st.integers(0, 3),
    units=st.integers(1, 5),
    file_rows=st.integers(1, 20),
    partition_by=st.sampled_from(["shard", "lang"]),
)
def test_every_row_comes_out_once_whatever_the_cut(
    tmp_path_factory, outcomes, filtered, units, file_rows, partition_by
):
    assume(outcomes or filtered)
    folder = tmp_path_factory.mktemp("out")
    store = Store(str(folder))
    output = OutputConfig(str(folder), target_file_rows=file_rows, partition_by=partition_by)
    manifest = run_of(store, units_of(units, len(outcomes) + filtered), outcomes, output, filtered)
    verify(VerifyConfig(output, deep=True))
    for kind, names in (("data", ("fused", "kept")), ("rejected", ("rejected",))):
        want = units * sum(outcomes.count(name) for name in names)
        path = folder / kind
        # With a type for the partition's column: pyarrow cannot infer one where every value is null.
        hive = ds.partitioning(pa.schema([(partition_by, pa.string())]), flavor="hive")
        table = ds.dataset(path, partitioning=hive).to_table() if path.is_dir() else None
        assert (table.num_rows if table else 0) == want
        assert table is None or len(set(table["row_id"].to_pylist())) == want
    assert all(file.rows <= file_rows for file in manifest.files)
    assert committed(store) == set()


def test_compaction_repeated_after_a_kill_writes_the_same_bytes(tmp_path):
    def files(folder, kill):
        store = Store(str(folder))
        output = OutputConfig(str(folder), target_file_rows=7)
        units = units_of(4, 5, groups=1)
        for unit in units:
            table = part_of(unit, ["fused"] * 5)
            commit(store, table, summarise(UnitBatch(unit, table), table))
        if kill:
            with pytest.raises(KeyboardInterrupt):
                compact_group(DiesAt(store, kill), "g00000", 1, units, FIELDS, output)
            assert committed(store), "the parts are kept until the group's entry is written"
        compact_group(store, "g00000", 1, units, FIELDS, output)
        return {p.name: p.read_bytes() for p in (folder / "data").rglob("*.parquet")}

    calm = files(tmp_path / "calm", kill=0)
    assert len(calm) == 3
    for write in (1, 2, 3):
        assert files(tmp_path / f"killed{write}", kill=write) == calm


def test_the_first_commit_wins(tmp_path):
    store = Store(str(tmp_path))
    unit = units_of(1, 2)[0]
    first, second = part_of(unit, ["fused", "fused"]), part_of(unit, ["fused", "rejected"])
    assert commit(store, first, summarise(UnitBatch(unit, first), first))
    assert not commit(store, second, summarise(UnitBatch(unit, second), second))
    assert read_summaries(store, [unit])[0].fused == 2


def test_a_unit_that_lost_a_row_is_not_committed():
    unit = units_of(1, 3)[0]
    table = part_of(unit, ["fused", "fused"])
    with pytest.raises(AccountingError, match="3 rows planned, 2 counted"):
        summarise(UnitBatch(unit, table), table)


def test_a_copy_of_a_compaction_that_was_slower_takes_the_others_entry(tmp_path):
    """Ray repeats a task on another node when its node does not answer, and the first task may still run."""
    store, units = Store(str(tmp_path)), units_of(2, 3, groups=1)
    output = OutputConfig(str(tmp_path))
    for unit in units:
        table = part_of(unit, ["fused"] * 3)
        commit(store, table, summarise(UnitBatch(unit, table), table))

    class Slow:
        """Between this task's question for the entry and its answer, the other task finishes."""

        def __getattr__(self, name):
            return getattr(store, name)

        def exists(self, path):
            there = store.exists(path)
            first.append(compact_group(store, "g00000", 1, units, FIELDS, output))
            return there

    first = []
    assert compact_group(Slow(), "g00000", 1, units, FIELDS, output) == first[0]
    with pytest.raises(FileNotFoundError):  # a part that is missing while there is no entry is a loss
        compact_group(store, "g00001", 1, units, FIELDS, output)


@pytest.fixture
def finished(tmp_path):
    output = OutputConfig(str(tmp_path / "out"), target_file_rows=4)
    manifest = run_of(Store(output.path), units_of(4, 5), ["fused", "rejected", "fused", "kept", "fused"], output)
    return tmp_path / "out", output, manifest


def damage_missing(root, manifest):
    (root / manifest.files[0].path).unlink()


def damage_flipped_bit(root, manifest):
    path = root / manifest.files[0].path
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def damage_stray_file(root, manifest):
    path = root / manifest.files[0].path
    path.with_name("part-stray.parquet").write_bytes(path.read_bytes())


def damage_counts(root, manifest):
    data = json.loads((root / MANIFEST).read_text())
    data["counts"]["fused"] += 1
    (root / MANIFEST).write_text(json.dumps(data))


def damage_lost_unit(root, manifest):
    (root / MANIFEST).write_bytes(replace(manifest, units=manifest.units[1:]).to_bytes())


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_missing, "missing"),
        (damage_flipped_bit, "checksum"),
        (damage_stray_file, "not in the manifest"),
        (damage_counts, "totals"),
        (damage_lost_unit, "is planned and not in the manifest"),
    ],
)
def test_verify_names_the_damage(finished, damage, says):
    root, output, manifest = finished
    verify(VerifyConfig(output, deep=True))
    damage(root, manifest)
    with pytest.raises(AccountingError, match=says):
        verify(VerifyConfig(output))


def test_deep_verify_finds_a_row_that_replaces_another_one(finished):
    """All counts are right and every row is in its unit's row range: only the row numbers of all files show it."""
    root, output, manifest = finished
    file = next(file for file in manifest.files if file.kind == "rejected")
    table = pq.ParquetFile(root / file.path).read()
    ids = table["row_id"].to_pylist()
    assert ids[0].endswith(":1")
    ids[0] = ids[0].removesuffix(":1") + ":2"  # row 2 is in data/, too; row 1 is in no file
    pq.write_table(table.set_column(table.schema.get_field_index("row_id"), "row_id", pa.array(ids)), root / file.path)
    data = (root / file.path).read_bytes()
    other = replace(file, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    files = tuple(other if known is file else known for known in manifest.files)
    (root / MANIFEST).write_bytes(replace(manifest, files=files).to_bytes())
    verify(VerifyConfig(output))
    with pytest.raises(AccountingError, match=r"s0\.parquet:2 is in another file, too"):
        verify(VerifyConfig(output, deep=True))


def test_verify_of_an_unfinished_or_foreign_folder_says_so(tmp_path):
    with pytest.raises(ConfigError, match="no output of this program"):
        verify(VerifyConfig(OutputConfig(str(tmp_path))))
    write_plan(Store(str(tmp_path)), Plan(1, {}, 1, (), (), ()))
    assert len(read_plans(Store(str(tmp_path)))) == 1
    with pytest.raises(ConfigError, match="not finished"):
        verify(VerifyConfig(OutputConfig(str(tmp_path))))
