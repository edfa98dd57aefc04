"""The fuse job as a user runs it: real processes, a real Ray cluster, SIGKILL and SIGTERM from outside."""

import os
import signal
import time

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from drivers import resumable
from outputs import snapshot

from capsfusion_ray.storage import Store

ECHO = ("engine.kind=echo", "cluster.gpus_per_actor=0", "cluster.max_actors=1", "source.passthrough=[width]")
BEAM = ("engine.dtype=float32", "engine.threads=1", *ECHO[1:])


@pytest.mark.timeout(3600)
def test_run_resume_extend_and_refuse(corpus, tmp_path, driver):
    """One output: a pilot, the whole input, the same command again, a new shard, a changed setting."""
    output = tmp_path / "out"
    paths = (f"input.path={corpus}", f"output.path={output}")
    args = ("conf/gates/report_only.yaml", *paths, *ECHO, "unit.rows=30", "output.target_file_rows=100")

    pilot = driver.run("fuse", *args, "input.limit=40")
    assert pilot["rows"]["fused"] == 40
    assert {p.split(":")[0] for p in ds.dataset(output / "data").to_table()["row_id"].to_pylist()} == {
        "a/part-0.parquet",
        "b/part-0.parquet",
        "c.parquet",
        "d.parquet",
    }
    pilot_files = snapshot(output)

    whole = driver.run("fuse", *args)
    assert whole["rows"]["fused"] == whole["rows"]["planned"] == 400
    assert whole["resumed_units"] == pilot["units"], "the full run reuses the pilot's captions"
    assert pilot_files.items() <= snapshot(output).items()

    again = driver.run("fuse", *args)
    assert again["resumed_units"] == again["units"] == whole["units"]

    (corpus / "e.parquet").write_bytes((corpus / "d.parquet").read_bytes())
    extended = driver.run("fuse", *args)
    assert extended["rows"]["fused"] == 480

    assert "decode.max_new_tokens: was 80, now 9" in driver.run("fuse", *args, "decode.max_new_tokens=9", code=2)
    (corpus / "c.parquet").touch()
    assert driver.run("fuse", *args)["resumed_units"] == extended["units"], "a new mtime is no change"

    verified = driver.run("verify", f"output.path={output}", "deep=true")
    assert verified["rows"]["planned"] == 480
    table = ds.dataset(output / "data", partitioning="hive").to_table()
    assert table.column_names[:7] == ["image_url", "laion_2b", "laion_coco", "capsfusion", "row_id", "flags", "width"]
    assert table.num_rows == len(set(table["row_id"].to_pylist())) == 480
    assert all(pq.read_metadata(p).num_rows <= 100 for p in (output / "data").rglob("*.parquet"))


@pytest.mark.timeout(3600)
def test_killed_drivers_lose_nothing_and_double_nothing(corpus, tmp_path, driver, pytestconfig):
    """SIGKILL at random moments after the first commit; the same command ends with the files of an undisturbed run.

    Two kills in `make test`. Ten kills with a real model: pytest tests/jobs -k killed --kills 10 --kill-engine beam
    """
    settings = ECHO if pytestconfig.option.kill_engine == "echo" else BEAM
    args = (f"input.path={corpus}", *settings, "unit.rows=5", "output.target_file_rows=32")
    undisturbed = tmp_path / "undisturbed"
    calm = driver.run("fuse", *args, f"output.path={undisturbed}")

    output = tmp_path / "out"
    found = driver.kill_fuse(
        Store(str(output)), pytestconfig.option.kills, calm["units"], *args, f"output.path={output}"
    )
    last = driver.run("fuse", *args, f"output.path={output}")
    assert all(0 < units < calm["units"] for units in found)
    assert 0 < last["resumed_units"] < last["units"]
    driver.run("verify", f"output.path={output}", "deep=true")
    assert snapshot(output) == snapshot(undisturbed)
    assert last["rows"] == calm["rows"]
    assert not list((output / "_units").glob("*.parquet")), "parts are deleted once their group is compacted"


@pytest.mark.timeout(3600)
def test_a_second_driver_is_refused_and_a_terminated_one_is_resumed(corpus, tmp_path, driver):
    """Two drivers on one output, then SIGTERM to the running one; the same command ends with the files of an undisturbed run."""
    args = (f"input.path={corpus}", *BEAM, "unit.rows=5", "output.target_file_rows=32")
    undisturbed = tmp_path / "undisturbed"
    driver.run("fuse", *args, f"output.path={undisturbed}")

    output = tmp_path / "out"
    first = driver.start("fuse", *args, f"output.path={output}")
    while not resumable(Store(str(output))):
        assert first.poll() is None, first.communicate()[1][-3000:]
        time.sleep(0.05)
    assert f"another driver works on this output ({os.uname().nodename}, pid {first.pid}" in driver.run(
        "fuse", *args, f"output.path={output}", code=2
    )
    assert first.poll() is None, "the run was over before its SIGTERM"
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=300)[1]
    assert first.returncode == 1
    assert "interrupted; everything committed is kept" in said
    last = driver.run("fuse", *args, f"output.path={output}")
    assert 0 < last["resumed_units"] < last["units"]
    driver.run("verify", f"output.path={output}", "deep=true")
    assert snapshot(output) == snapshot(undisturbed)
