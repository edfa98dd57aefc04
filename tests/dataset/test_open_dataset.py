"""open_dataset reads exactly what the manifest names, from every kind of store."""

import pickle

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from outputs import FIELDS, part_of, run_of, units_of

from capsfusion_ray.config import OutputConfig
from capsfusion_ray.core.accounting import summarise
from capsfusion_ray.core.plan import Plan, PlannedShard
from capsfusion_ray.core.unit_batch import UnitBatch
from capsfusion_ray.dataset.compaction import compact_group
from capsfusion_ray.dataset.manifest import assemble, read_manifest, swap_manifest
from capsfusion_ray.dataset.open_dataset import list_files, open_dataset
from capsfusion_ray.dataset.plan_files import write_plan
from capsfusion_ray.dataset.unit_files import commit
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.storage import Store

OUTCOMES = ["fused", "rejected", "kept", "fused", "fused"]
UNITS = 4
KEPT = {0, 2, 3, 4}  # row numbers in a unit whose rows are in data/


def finished(store, partition_by="shard"):
    run_of(store, units_of(UNITS, 5), OUTCOMES, OutputConfig(store.root, target_file_rows=3, partition_by=partition_by))


def ids(rejected=False):
    wanted = {1} if rejected else KEPT
    return {f"{unit.path}:{unit.start + i}" for unit in units_of(UNITS, 5) for i in wanted}


def open_(store, kind="data"):
    return open_dataset(store.root, store.options, kind)


@pytest.mark.parametrize("partition_by", ["shard", "lang"])
def test_every_row_is_read_once_from_every_kind_of_store(store, partition_by):
    finished(store, partition_by)
    dataset = open_(store)
    assert isinstance(dataset, ds.Dataset)
    table = dataset.to_table()
    assert table.num_rows == dataset.count_rows() == len(ids())
    assert set(table["row_id"].to_pylist()) == ids()
    assert set(open_(store, "rejected").to_table()["row_id"].to_pylist()) == ids(rejected=True)
    assert "reason" in open_(store, "rejected").schema.names


@pytest.mark.parametrize("partition_by", ["shard", "lang"])
def test_files_that_the_manifest_does_not_name_are_not_read(store, partition_by):
    finished(store, partition_by)
    before = open_(store).to_table()
    file = next(file for file in read_manifest(store).files if file.kind == "data")
    folder = file.path.rpartition("/")[0]
    store.put(f"{folder}/part-r009-00000.parquet", store.get(file.path))  # rows that would be read twice
    store.put(f"{folder}/notes.parquet", b"no Parquet")
    store.put("data/lang=xx/part-r001-00000.parquet", b"no Parquet")
    assert open_(store).to_table() == before


def test_a_partition_column_is_a_column_with_its_type_and_null_is_null(store):
    finished(store, "lang")
    dataset = open_(store)
    assert dataset.schema.field("lang").type == pa.string()
    rows = dataset.to_table(columns=["row_id", "lang"]).to_pylist()
    assert {row["row_id"]: row["lang"] for row in rows} == {
        f"{unit.path}:{unit.start + i}": "en" if i % 2 else None
        for unit in units_of(UNITS, 5)
        for i in KEPT  # as outputs.part_of writes them
    }
    english = dataset.to_table(filter=ds.field("lang") == "en").num_rows
    unknown = dataset.to_table(filter=ds.field("lang").is_null()).num_rows
    assert (english, unknown) == (UNITS * 1, UNITS * 3)


@pytest.mark.parametrize(
    ("type_", "name", "values"),
    [
        (pa.int64(), "int64", [3, -1, None]),
        (pa.float64(), "double", [0.25, 1e300, None]),
        (pa.bool_(), "bool", [True, False, None]),
        (pa.date32(), "date32[day]", [18_000, None, 0]),
        (pa.string(), "string", ["a/b=../c%2F", "ü .", None]),
    ],
)
def test_a_partition_column_of_any_type_comes_back_as_it_was(tmp_path, type_, name, values):
    store, fields = Store(str(tmp_path)), (("key", name),)
    output = OutputConfig(store.root, partition_by="key")
    (unit,) = units_of(1, len(values), groups=1)
    base = {"output.partition_by": "key"}
    plan = Plan(1, base, 10, fields, (unit,), (PlannedShard(unit.path, "c", 99, unit.group),))
    write_plan(store, plan)
    part = part_of(unit, ["fused"] * len(values))
    keys = pa.array(values, pa.int32()).cast(type_) if type_ == pa.date32() else pa.array(values, type_)
    at = part.schema.get_field_index(FIELDS[0][0])
    part = part.set_column(at, pa.field("key", type_), keys)
    commit(store, part, summarise(UnitBatch(unit, part), part))
    swap_manifest(
        store, None, assemble([plan], [compact_group(store, unit.group, 1, [unit], fields, output)], [{"revision": 1}])
    )
    table = open_dataset(store.root).to_table().sort_by("row_id")
    assert table.schema.field("key").type == type_
    assert table["key"].combine_chunks() == keys


def test_the_schema_is_that_of_the_plan_even_without_a_row(tmp_path):
    store = Store(str(tmp_path))
    run_of(store, units_of(1, 2, groups=1), ["fused", "fused"], OutputConfig(store.root))
    rejected = open_dataset(store.root, kind="rejected")
    assert rejected.count_rows() == 0
    assert {"row_id", "reason", "detail", "lang"} <= set(rejected.schema.names)
    assert rejected.to_table().num_rows == 0


def test_an_output_that_is_not_finished_is_refused(store):
    with pytest.raises(ConfigError, match=r"has no manifest\.json, and open_dataset needs a finished output"):
        open_(store)


def test_an_unknown_kind_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(
        ConfigError, match=r"kind=filtered: there is no such kind of rows; choose one of data, rejected"
    ):
        open_dataset(str(tmp_path), kind="filtered")


def test_the_files_are_listed_with_a_filesystem_that_can_be_sent_to_another_process(store):
    finished(store, "lang")
    files = list_files(store.root, store.options)
    assert list(files.paths) == [file.path for file in read_manifest(store).files if file.kind == "data"]
    assert files.rows == len(ids())
    assert {value.as_py() for value in files.partition.values()} == {"en", None}
    there = pickle.loads(pickle.dumps(files.filesystem))
    assert there == files.filesystem
    info = there.get_file_info(files.paths[0])
    assert (info.is_file, info.size) == (True, len(store.get(files.paths[0])))
    assert not there.get_file_info("data/none.parquet").is_file
    with there.open_input_file(files.paths[0]) as file:
        assert file.read() == store.get(files.paths[0])
    assert "secret" not in repr(there)
