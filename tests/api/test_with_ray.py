"""The API in a process that uses Ray itself, as a notebook or a pipeline of the user's own does."""

import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from echo_run import finished
from lighthouses import captions

import capsfusion_ray as cf


def test_without_a_ray_of_its_own_the_process_is_left_as_it_was(tmp_path):
    pq.write_table(pa.Table.from_pylist(captions("a", 20)), tmp_path / "a.parquet")
    sigterm = signal.getsignal(signal.SIGTERM)
    cf.fuse(tmp_path / "a.parquet", tmp_path / "out", engine="echo")
    assert not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) is sigterm


@pytest.fixture(scope="module")
def users_ray():
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def test_fuse_uses_the_ray_of_the_process_and_leaves_it_running(users_ray, tmp_path):
    pq.write_table(pa.Table.from_pylist(captions("a", 20)), tmp_path / "a.parquet")
    address = ray.get_runtime_context().gcs_address
    done = cf.fuse(tmp_path / "a.parquet", tmp_path / "out", engine="echo", config={"cluster.cpus_per_actor": 0.5})
    assert done.rows.planned == done.rows.done == 20
    assert ray.is_initialized()
    assert ray.get_runtime_context().gcs_address == address
    assert len(cf.open_dataset(tmp_path / "out").to_ray().take_all()) == done.rows.fused + done.rows.kept


def test_a_fuser_is_a_stage_of_the_users_own_pipeline(users_ray):
    rows = captions("b", 12)
    raw, synthetic = "laion_2b", "laion_coco"
    dataset = ray.data.from_items(rows).map_batches(
        cf.Fuser,
        fn_constructor_kwargs={"engine": "echo", "columns": ("capsfusion", "outcome")},
        batch_format="pyarrow",
        batch_size=5,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0.5,
    )
    got = {(row[raw], row[synthetic]): (row["capsfusion"], row["outcome"]) for row in dataset.take_all()}
    want = cf.Fuser(engine="echo")([row[raw] for row in rows], [row[synthetic] for row in rows])
    assert got == {
        (row[raw], row[synthetic]): (fused.capsfusion, "fused") for row, fused in zip(rows, want, strict=True)
    }


@pytest.mark.parametrize("by", ["shard", "lang"])
def test_to_ray_gives_the_rows_of_to_table(users_ray, tmp_path, by):
    finished(tmp_path, by)
    for kind in ("data", "rejected"):
        dataset = cf.open_dataset(tmp_path / "out", kind=kind)
        want = sorted(dataset.to_table().to_pylist(), key=lambda row: row["row_id"])
        assert sorted(dataset.to_ray().take_all(), key=lambda row: row["row_id"]) == want
        assert dataset.to_ray(["row_id", "lang"]).schema().names == ["row_id", "lang"]
