"""The wheel as a user installs it: in a folder of its own, run from another folder, with nothing of the checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """The folder that the wheel is installed in. Its dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("site")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(folder),
        str(wheel),
    ]
    subprocess.run(pip, check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture
def run(site, tmp_path):
    """Run a command in an empty folder; what it printed, and its exit code."""

    def run(*words):
        env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
        return subprocess.run(
            words, cwd=tmp_path, env=env | {"PYTHONPATH": str(site)}, capture_output=True, text=True, timeout=300
        )

    return run


def test_the_wheel_holds_the_configs_the_captions_of_the_demo_the_embedded_model_and_the_types(wheel):
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
    for folder in ("conf", "examples/captions", "models/capsfusion-tiny"):
        files = [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()]
        assert files
        assert not [path for path in files if f"capsfusion_ray/_bundled/{path}" not in held]
    assert "capsfusion_ray/py.typed" in held
    assert not [name for name in held if name.startswith(("tests/", "jobs/", "benchmarks/"))]


def test_the_command_runs_the_demo_in_any_folder(run, site, tmp_path):
    command = str(site / "bin/capsfusion")
    fused = run(command, "fuse", "conf/demo.yaml", "input.limit=12", "output.path=out")
    assert fused.returncode == 0, fused.stderr[-3000:]
    rows = json.loads(fused.stdout.splitlines()[-1])["rows"]
    assert rows["planned"] == 12
    assert rows["fused"] > 0
    assert f"path: {site}/capsfusion_ray/_bundled/examples/captions" in _config_of(tmp_path / "out")
    verified = run(command, "verify", "output.path=out", "deep=true")
    assert json.loads(verified.stdout.splitlines()[-1])["rows"] == rows
    shown = run(command, "show", "output.path=out")
    assert "Rows by outcome" in shown.stdout
    assert (tmp_path / "out/report.html").is_file()


def _config_of(output):
    return "".join(path.read_text("utf-8") for path in (output / "_run").rglob("*.yaml"))


def test_the_api_runs_in_any_folder(run, site):
    script = """
import capsfusion_ray as cf, sys
assert cf.__file__.startswith(sys.argv[1]), cf.__file__
(fused,) = cf.Fuser()(["Cape Nord lighthouse 1889"], ["A tall tower by the sea."])
print(fused.capsfusion)
print(cf.plan(output="out", engine="echo", config="conf/demo.yaml").rows)
"""
    ran = run(sys.executable, "-c", script, str(site))
    assert ran.returncode == 0, ran.stderr[-3000:]
    caption, rows = ran.stdout.splitlines()
    assert "Cape Nord" in caption
    assert int(rows) == 325


def test_submit_says_that_it_uploads_a_checkout(run, site):
    ran = run(str(site / "bin/capsfusion"), "submit", "fuse", "conf/demo.yaml", "output.path=out")
    assert ran.returncode == 2
    assert "no checkout of the project" in ran.stderr
    assert "-- capsfusion fuse" in ran.stderr


def test_the_version_of_the_command_is_that_of_the_wheel(run, site, wheel):
    version = run(str(site / "bin/capsfusion"), "--version").stdout.split()[-1]
    assert wheel.name.startswith(f"capsfusion_ray-{version}-")
