"""cf.open_dataset: the rows of the manifest and no others, for pyarrow and `datasets`. For Ray: test_with_ray.py."""

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from echo_run import finished, rows_of

import capsfusion_ray as cf


@pytest.fixture(scope="module", params=["shard", "lang"])
def output(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    finished(folder, request.param)
    return folder


@pytest.mark.parametrize("kind", ["data", "rejected"])
def test_it_has_the_rows_of_the_files_that_the_manifest_names_and_no_others(output, kind):
    want = rows_of(output, kind)
    stray = output / "out" / kind / "shard=stray/part-stray.parquet"
    stray.parent.mkdir()
    pq.write_table(pq.read_table(next((output / "out" / kind).rglob("part-r*.parquet")), partitioning=None), stray)
    try:
        dataset = cf.open_dataset(output / "out", kind=kind)
        table = dataset.to_table()
        assert not [file for file in dataset.files if "stray" in file]
    finally:
        stray.unlink()
        stray.parent.rmdir()
    assert len(dataset) == table.num_rows == len(want)
    assert {row["row_id"]: row["capsfusion"] for row in table.to_pylist()} == {
        row_id: row["capsfusion"] for row_id, row in want.items()
    }
    assert table.schema == dataset.schema
    assert set(table["lang"].to_pylist()) == {"en", None}, "the column of the partition is one of the dataset"
    assert dataset.to_hf().to_dict() == table.to_pydict()


def test_columns_and_rows_can_be_chosen(output):
    dataset = cf.open_dataset(output / "out")
    table = dataset.to_table(["row_id", "capsfusion"], pc.field("lang") == "en")
    assert table.schema.names == ["row_id", "capsfusion"]
    assert 0 < table.num_rows < len(dataset)
    assert dataset.to_arrow().count_rows() == len(dataset)
    assert str(len(dataset)) in repr(dataset)


def test_what_is_no_finished_output_is_a_config_error(output, tmp_path):
    with pytest.raises(cf.ConfigError):
        cf.open_dataset(tmp_path)
    with pytest.raises(cf.ConfigError, match="choose one of"):
        cf.open_dataset(output / "out", kind="dat")
