"""The job `train` as a user runs it: on Ray Train, killed with SIGKILL, and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "model.vocab_size=400",
    "model.hidden=32",
    "model.layers=2",
    "model.heads=2",
    "model.ffn=48",
    "augment.copy_only_steps=2",
    "augment.copy_fade_steps=4",
    "optim.steps=60",
    "optim.warmup_steps=2",
    "optim.decay_steps=10",
    "optim.batch_triples=8",
    "output.checkpoint_every=5",
    "output.validate_every=5",
    "data.validation_rows=40",
    "cluster.threads=1",
]


def start(arguments, log):
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.Popen(
        [sys.executable, "jobs/train.py", "conf/train/tiny.yaml", *TINY, *arguments],
        cwd=ROOT,
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def curve(folder):
    """The lines of the learning curve; the last one may be half written while the run goes on."""
    path = Path(f"{folder}.run") / "curve.jsonl"
    return path.read_text("utf-8").splitlines() if path.exists() else []


def steps(folder):
    return [json.loads(line)["step"] for line in curve(folder)]


@pytest.mark.timeout(900)
def test_a_run_killed_without_warning_resumes_and_a_second_stage_starts_from_its_model(triples_file, tmp_path):
    folder = tmp_path / "model"
    arguments = [f"data.path={triples_file}", f"output.path={folder}"]
    with (tmp_path / "log").open("w") as log:
        first = start(arguments, log)
        deadline = time.monotonic() + 400
        while len(curve(folder)) < 3 and time.monotonic() < deadline and first.poll() is None:
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGKILL)  # the driver, and with it Ray and the worker
        first.wait()
        before = curve(folder)
        assert len(before) >= 3, (tmp_path / "log").read_text()
        second = start(arguments, log)
        assert second.wait(timeout=400) == 0, (tmp_path / "log").read_text()
    # The run resumed from a checkpoint: the rows before it, whose tokens_per_s is a measured time, were not written again.
    assert curve(folder)[:2] == before[:2]
    assert steps(folder) == list(range(5, 65, 5))
    assert (folder / "model.safetensors").is_file()
    assert (folder / "fusion.json").is_file()
    assert (Path(f"{folder}.run") / "curve.png").stat().st_size > 1000
    assert "validation_loss" in (Path(f"{folder}.run") / "curve.md").read_text("utf-8")
    # The second stage starts from a relative path, which is relative to the folder of the user and not of the worker.
    second = tmp_path / "second"
    arguments = [f"data.path={triples_file}", f"output.path={second}", f"model.path={os.path.relpath(folder, ROOT)}"]
    with (tmp_path / "log").open("w") as log:
        reinforced = start([*arguments, "reinforce.samples=2", "optim.steps=2", "optim.decay_steps=1"], log)
        assert reinforced.wait(timeout=400) == 0, (tmp_path / "log").read_text()
    assert (second / "model.safetensors").is_file()
    assert "validation_reward" in (Path(f"{second}.run") / "curve.md").read_text("utf-8")


def test_another_recipe_does_not_continue_a_run(triples_file, tmp_path):
    from capsfusion_ray.config import parse_config
    from capsfusion_ray.errors import ConfigError
    from capsfusion_ray.training.config import TrainConfig
    from capsfusion_ray.training.job import _refuse_another_run

    path = tmp_path / "config.json"
    base = [f"data.path={triples_file}", f"output.path={tmp_path / 'm'}"]
    _refuse_another_run(parse_config(TrainConfig, base), path)
    _refuse_another_run(parse_config(TrainConfig, [*base, "optim.steps=9000", "cluster.threads=1"]), path)
    with pytest.raises(ConfigError, match="with other settings"):
        _refuse_another_run(parse_config(TrainConfig, [*base, "model.hidden=64"]), path)
