"""A partition's folder has a safe name, and its value is read back from the path."""

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from capsfusion_ray.dataset.partitions import BY_SHARD, NULL_PARTITION, folder_of, split_by_partition, value_of

TEXTS = st.text(alphabet=st.characters(codec="utf-8"), max_size=20)


@given(TEXTS.filter(lambda text: text not in ("", NULL_PARTITION)))
def test_a_value_is_read_back_from_its_folder_which_is_one_safe_name(value):
    folder = folder_of("lang", value)
    assert value_of(f"data/{folder}/part-r001-00000.parquet") == value
    assert "/" not in folder
    assert "." not in folder
    assert folder.isascii()


def test_null_and_the_empty_text_have_the_folder_of_hive():
    assert folder_of("lang", None) == folder_of("lang", "") == f"lang={NULL_PARTITION}"
    assert value_of(f"data/lang={NULL_PARTITION}/a.parquet") is None


@given(st.lists(st.one_of(st.none(), TEXTS), max_size=20))
def test_every_row_is_in_the_partition_of_its_value_in_its_order(values):
    table = pa.table({"key": pa.array(values, pa.string()), "n": pa.array(range(len(values)), pa.int64())})
    parts = split_by_partition(table, "key", "g00000")
    assert [part["n"].to_pylist() for _, part in parts] == [
        [n for n, other in enumerate(values) if other == value]
        for value in sorted(set(values), key=lambda value: (value is None, value))
    ]
    for folder, part in parts:
        assert {folder_of("key", value) for value in part["key"].to_pylist()} == {folder}


def test_by_shard_all_rows_are_in_the_groups_folder():
    table = pa.table({"n": [1, 2]})
    assert split_by_partition(table, BY_SHARD, "g00017") == [("shard=g00017", table)]
    assert split_by_partition(table.slice(0, 0), BY_SHARD, "g00017") == []
