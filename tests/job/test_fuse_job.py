"""The job as a user runs it: real processes, a real Ray cluster, SIGKILL and SIGTERM from outside."""

import json
import os
import shutil
import signal
import threading
import time

import psutil
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from drivers import resumable
from outputs import snapshot

from capsfusion_ray.models import locate
from capsfusion_ray.storage import Store

ECHO = ("engine.kind=echo", "cluster.gpus_per_actor=0", "cluster.max_actors=1", "source.passthrough=[width]")
BEAM = ("engine.dtype=float32", "engine.threads=1", *ECHO[1:])


@pytest.mark.timeout(3600)
def test_run_resume_extend_and_refuse(corpus, tmp_path, driver):
    """One output's life: a pilot, the whole, nothing left to do, a new shard, a changed setting."""
    output = tmp_path / "out"
    paths = (f"input.path={corpus}", f"output.path={output}")
    args = ("conf/gates/report_only.yaml", *paths, *ECHO, "unit.rows=30", "output.target_file_rows=100")

    pilot = driver.run("fuse", *args, "input.limit=40")
    assert pilot["rows"]["fused"] == 40
    assert {p.split(":")[0] for p in ds.dataset(output / "data").to_table()["row_id"].to_pylist()} == {
        "a/part-0.parquet", "b/part-0.parquet", "c.parquet", "d.parquet",
    }  # fmt: skip
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
    """SIGKILL at random moments after the first commit; the same command ends with the undisturbed run's very files.

    Twice in `make test`. Ten times, with a real model: pytest tests/job -k killed --kills 10 --kill-engine beam
    """
    settings = ECHO if pytestconfig.option.kill_engine == "echo" else BEAM
    args = (f"input.path={corpus}", *settings, "unit.rows=5", "output.target_file_rows=32")
    undisturbed = tmp_path / "undisturbed"
    calm = driver.run("fuse", *args, f"output.path={undisturbed}")

    output = tmp_path / "out"
    found = driver.kill_fuse(Store(str(output)), pytestconfig.option.kills, calm["units"], *args, f"output.path={output}")
    last = driver.run("fuse", *args, f"output.path={output}")
    assert all(0 < units < calm["units"] for units in found)
    assert 0 < last["resumed_units"] < last["units"]
    driver.run("verify", f"output.path={output}", "deep=true")
    assert snapshot(output) == snapshot(undisturbed)
    assert last["rows"] == calm["rows"]
    assert not list((output / "_units").glob("*.parquet")), "parts go once they are compacted"


@pytest.mark.timeout(3600)
def test_a_second_driver_is_refused_and_a_terminated_one_is_resumed(corpus, tmp_path, driver):
    """Two processes on one output, then SIGTERM to the one at work; the same command ends with the undisturbed run's very files."""
    args = (f"input.path={corpus}", *BEAM, "unit.rows=5", "output.target_file_rows=32")
    undisturbed = tmp_path / "undisturbed"
    driver.run("fuse", *args, f"output.path={undisturbed}")

    output = tmp_path / "out"
    first = driver.start("fuse", *args, f"output.path={output}")
    while not resumable(Store(str(output))):
        assert first.poll() is None, first.communicate()[1][-3000:]
        time.sleep(0.05)
    assert f"another driver is at work on this output ({os.uname().nodename}, pid {first.pid}" in driver.run(
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


@pytest.mark.timeout(3600)
def test_an_engine_that_does_not_start_again_is_waited_for_while_the_other_goes_on(corpus, tmp_path, driver):
    """SIGKILL to one of two actors once their model is gone from the disk, as on a node that broke; it comes back later."""
    model, away, output = tmp_path / "model", tmp_path / "away", tmp_path / "out"
    shutil.copytree(locate(""), model)
    store = Store(str(output))
    pool = ("cluster.gpus_per_actor=0", "cluster.min_actors=2", "cluster.max_actors=2", "cluster.cpus_per_actor=1")
    settings = (f"engine.model={model}", "engine.dtype=float32", "engine.threads=1", "engine.slots=2", "engine.start_patience_s=120", "unit.rows=2")
    run = driver.start("fuse", f"input.path={corpus}", f"output.path={output}", *pool, *settings)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(run.stderr))  # or the pipe is full, and the run stands still
    reader.start()
    until(lambda: resumable(store), run, "a first commit")

    model.rename(away)
    actors_of(driver)[0].kill()
    until(lambda: any(start["number"] >= 3 and "no such folder" in start["error"] for start in starts(store)), run, "a third start in vain")
    done = resumable(store)
    until(lambda: resumable(store) > done, run, "commits of the other one")
    away.rename(model)

    out = run.stdout.read()
    assert run.wait(600) == 0, "".join(said)[-3000:]
    reader.join()
    assert json.loads(out.splitlines()[-1])["rows"]["planned"] == 400
    assert "cannot start its engine" in "".join(said)
    assert not starts(store), "both are up at the end"
    driver.run("verify", f"output.path={output}", "deep=true")


def actors_of(driver):
    """The processes that fuse, of the driver's cluster alone."""
    address = f"--gcs-address={driver.env['RAY_ADDRESS']}"
    [raylet] = [p for p in psutil.process_iter(["name", "cmdline"]) if p.info["name"] == "raylet" and address in p.info["cmdline"]]
    return [p for p in raylet.children(recursive=True) if "FusionActor" in " ".join(p.cmdline())]


def starts(store):
    """The notes of actors that are not up."""
    notes = [store.get_with_etag(file.path) for file in store.list("_run/starts") if not file.path.endswith("up.json")]
    return [json.loads(note[0]) for note in notes if note]


def until(seen, run, what):
    while not seen():
        assert run.poll() is None, f"the run ended before {what}"
        time.sleep(0.05)
