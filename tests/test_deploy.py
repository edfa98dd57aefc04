"""Tests of what is sent to a cluster: one `ray job submit` line, the uploaded files, the packages, the metrics."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import yaml
from click.testing import CliRunner
from ray.dashboard.modules.job import cli
from ray.job_submission import JobStatus

from capsfusion_ray.run import prometheus as monitor
from capsfusion_ray.run.submit import SubmitConfig, command, exit_code

ROOT = Path(__file__).resolve().parents[1]


def test_the_pip_environment_holds_the_dependencies_of_the_package():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pip = yaml.safe_load((ROOT / "deploy/runtime_env_pip.yaml").read_text())["pip"]
    assert pip == [name for name in wanted if not name.startswith("ray[")], "the cluster already has Ray"


def test_the_environment_of_vllm_adds_its_extra_and_pins_no_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pip = yaml.safe_load((ROOT / "deploy/runtime_env_vllm.yaml").read_text())["pip"]
    plain = yaml.safe_load((ROOT / "deploy/runtime_env_pip.yaml").read_text())["pip"]
    assert pip == plain + project["optional-dependencies"]["vllm"]
    assert not any("==" in name for name in pip), "vLLM pins the versions"
    assert "vllm" not in " ".join(project["dependencies"] + project["optional-dependencies"]["dev"]), (
        "the package itself must not depend on vLLM"
    )


def test_all_environments_upload_the_files_of_the_job_and_exclude_the_same_folders():
    files = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "deploy").glob("runtime_env*.yaml"))]
    assert len(files) == 3
    assert files[0]["excludes"] == files[1]["excludes"] == files[2]["excludes"]
    for folder in ("jobs", "capsfusion_ray", "conf", "examples", "models"):
        assert f"/{folder}/" not in files[0]["excludes"]
    for excluded in files[0]["excludes"]:
        assert (ROOT / excluded.strip("/")).exists(), f"{excluded}: excluded, but it does not exist"


def test_the_image_has_every_file_that_the_package_is_built_from_before_it_is_installed():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    before = (ROOT / "deploy/Dockerfile").read_text().partition(" -e .")[0]
    copied = re.findall(r"^COPY (\S+) \1$", before, re.MULTILINE)
    assert set(wheel["force-include"]) <= set(copied)
    assert all((ROOT / path).exists() for path in copied)


def test_submit_is_one_ray_job_line_and_keeps_arguments_with_special_characters(monkeypatch):
    words = [
        "jobs/fuse.py",
        "filter={max_punsafe: 0.5}",
        "input.path=s3://b/in/*.parquet",
        "output.path=it's größe $HOME",
    ]
    cfg = SubmitConfig("http://head:8265", str(ROOT / "deploy/runtime_env.yaml"))
    line = command(cfg, ROOT, "fuse-1", words)
    assert line[1:5] == ["job", "submit", "--address", "http://head:8265"]
    sent = {}
    client = SimpleNamespace(
        submit_job=lambda **job: sent.update(job) or "fuse-1",
        get_address=lambda: line[4],
        get_version=lambda: ray.__version__,
    )
    monkeypatch.setattr(cli, "_get_sdk_client", lambda *args, **kwargs: client)
    done = CliRunner().invoke(cli.submit, ["--no-wait", *line[3:]])
    assert done.exit_code == 0, done.output
    assert shlex.split(sent["entrypoint"]) == ["python", *words], "the words that the shell of the head node passes on"
    assert not any(part.startswith("--entrypoint-num") for part in line), (
        "a head node may have no CPU and no GPU for tasks"
    )


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", 1, 1),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 1),
        ("RUNNING", None, 1),
    ],
)
def test_submit_ends_as_the_job_did(status, driver, code):
    """RUNNING: the connection that followed the log was cut off; the job must not count as done."""
    assert exit_code(JobStatus(status), driver) == code


def test_dashboard_alerts_and_docs_use_exactly_the_metrics_that_exist():
    assert set(re.findall(r"`(ray_capsfusion_\w+)`", (ROOT / "docs/monitoring.md").read_text())) == (
        {f"ray_{name}_total" for name in monitor.COUNTERS}
        | {f"ray_{name}" for name in (*monitor.GAUGES, *monitor.HISTOGRAMS)}
    )
    served = {f"ray_{name}_total" for name in monitor.COUNTERS} | {f"ray_{name}" for name in monitor.GAUGES}
    served |= {f"ray_{name}_bucket" for name in monitor.HISTOGRAMS}
    dashboard = json.loads((ROOT / "deploy/monitoring/grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = set(re.findall(r"ray_\w+", " ".join(queries)))
    assert shown == served, "a metric that no panel shows, or a panel whose metric does not exist"
    rules = yaml.safe_load((ROOT / "deploy/monitoring/alerts.yaml").read_text())["groups"][0]["rules"]
    assert set(re.findall(r"ray_\w+", " ".join(rule["expr"] for rule in rules))) <= served
