"""A Ray cluster and this one process leave the same output: names and bytes of all files, and the manifest but for its times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from old_outputs import FIXTURE, copy_of
from outputs import snapshot

ROOT = Path(__file__).resolve().parents[2]
ECHO = ("engine.kind=echo", "gates.cut_off={action: reject, threshold: 1, flag_from: null}")
BEAM = ("engine.dtype=float32", "engine.threads=1", "input.limit=40")
# How long a run took and on what: these differ from run to run.
OF_THE_MOMENT = {"seconds", "engine_s", "busy_s", "device", "cost"}


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in OF_THE_MOMENT}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def manifest(output):
    return without_times(json.loads((output / "manifest.json").read_bytes()))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", [ECHO, BEAM], ids=["echo", "beam"])
def test_both_executors_leave_the_same_output(corpus, tmp_path, driver, engine):
    words = [
        f"input.path={corpus}",
        *engine,
        "source.passthrough=[width]",
        "unit.rows=10",
        "output.target_file_rows=32",
        "cluster.gpus_per_actor=0",
        "cluster.max_actors=1",
    ]
    on_ray = driver.run("fuse", *words, f"output.path={tmp_path / 'ray'}")
    command = [sys.executable, "-m", "capsfusion_ray", "fuse", *words, "cluster.kind=local"]
    local = subprocess.run([*command, f"output.path={tmp_path / 'local'}"], cwd=ROOT, capture_output=True, text=True)
    assert local.returncode == 0, local.stderr[-3000:]
    assert json.loads(local.stdout.splitlines()[-1])["rows"] == on_ray["rows"]
    assert on_ray["rows"]["fused"] > 0
    assert snapshot(tmp_path / "local") == snapshot(tmp_path / "ray")
    assert manifest(tmp_path / "local") == manifest(tmp_path / "ray")


@pytest.mark.timeout(3600)
def test_an_output_that_version_0_1_began_is_resumed_on_ray(tmp_path, driver):
    done = driver.run("fuse", *copy_of("begun", tmp_path))
    assert (done["units"], done["resumed_units"]) == (8, 2)
    assert snapshot(tmp_path / "begun") == snapshot(FIXTURE / "finished")
    driver.run("verify", f"output.path={tmp_path / 'begun'}", "deep=true")
