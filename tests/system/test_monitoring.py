"""A real Prometheus scrapes a real run: every query of the dashboard has data, and every alert rule is evaluated."""

import json
import math
import os
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from moto_server import KEYS, client, moto_server
from ports import free_port
from proxy import FaultProxy, Faults
from ray_nodes import ray_nodes

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "deploy/monitoring"
CAPTIONS = ROOT / "examples/captions"
BUCKET = "captions"
THROTTLED = Faults(0.1, ("slow_down",))
SCRAPE_S = 1
RATE_INTERVAL = "15s"  # what Grafana would put for $__rate_interval: at least four scrapes
# Panels that rightly have no value on this machine: none. GPU memory is told as 0 by an actor without a GPU.
EMPTY_ON_A_CPU: frozenset[str] = frozenset()

CONFIG = """
global: {{scrape_interval: {every}s, evaluation_interval: {every}s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: ray
    file_sd_configs: [{{files: [{discovery}], refresh_interval: 1s}}]
"""


class Prometheus:
    """Its HTTP API."""

    def __init__(self, url):
        self._url = url

    def get(self, path, **parameters):
        with urllib.request.urlopen(
            f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=60
        ) as answer:
            return json.load(answer)["data"]

    def values(self, query, start, end):
        """Every number that a panel over this time would draw."""
        found = self.get("query_range", query=query, start=start, end=end, step=SCRAPE_S)["result"]
        return [float(value) for series in found for _, value in series["values"] if math.isfinite(float(value))]

    def targets_up(self):
        return [target["health"] for target in self.get("targets")["activeTargets"]]


@contextmanager
def prometheus(folder, discovery):
    """The process, with Ray's own list of targets and the project's rules."""
    address = f"127.0.0.1:{free_port()}"
    config = folder / "prometheus.yml"
    config.write_text(CONFIG.format(every=SCRAPE_S, rules=MONITORING / "alerts.yaml", discovery=discovery))
    line = [
        "/usr/bin/prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "prometheus.log").open("wb") as log, subprocess.Popen(line, stdout=log, stderr=log) as process:
        try:
            api = Prometheus(f"http://{address}")
            wait_for(
                lambda: api.targets_up() and set(api.targets_up()) == {"up"}, "every node of Ray to be scraped", process
            )
            yield api
        finally:
            process.terminate()


def wait_for(seen, what, process, patience_s=300):
    until = time.monotonic() + patience_s
    while True:
        assert process.poll() is None, f"it ended, waiting for {what}"
        assert time.monotonic() < until, f"no sign of it in {patience_s} s: {what}"
        try:
            if seen():
                return
        except OSError:
            pass  # not up yet
        time.sleep(0.5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The demo's captions, fused by the embedded model, from and to a store that answers one request in ten with 503."""
    folder = tmp_path_factory.mktemp("monitoring")
    with moto_server(folder / "moto.log") as server, FaultProxy(server) as proxy:
        s3 = client("s3", server)
        s3.create_bucket(Bucket=BUCKET)
        for shard in CAPTIONS.iterdir():
            s3.put_object(Bucket=BUCKET, Key=f"in/{shard.name}", Body=shard.read_bytes())
        env = {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": KEYS["key"],
            "AWS_SECRET_ACCESS_KEY": KEYS["secret"],
            "RAY_AUTH_MODE": "disabled",
            "RAY_metrics_report_interval_ms": "2000",
        }
        with (
            ray_nodes(3, env=env) as nodes,
            prometheus(folder, nodes.session / "prom_metrics_service_discovery.json") as api,
        ):
            proxy.inject(THROTTLED)
            began = time.time()
            line = [
                sys.executable,
                "jobs/fuse.py",
                "conf/demo.yaml",
                f"input.path=s3://{BUCKET}/in",
                f"output.path=s3://{BUCKET}/out",
                "input.limit=160",
                "unit.rows=10",
            ]
            done = subprocess.run(
                line, cwd=ROOT, env={**os.environ, **env, "RAY_ADDRESS": nodes.gcs}, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[-3000:]
            assert proxy.count("slow_down"), "the store was to fail"
            time.sleep(5 * SCRAPE_S)  # the last values on their way
            yield api, json.loads(done.stdout.splitlines()[-1]), began, time.time()


def panels():
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    return [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]]


@pytest.mark.timeout(1800)
def test_every_panel_of_the_dashboard_has_data(run):
    api, _, began, ended = run
    drawn = {
        (title, query): api.values(query.replace("$__rate_interval", RATE_INTERVAL), began, ended)
        for title, query in panels()
    }
    for (title, query), values in drawn.items():
        print(
            f"{title:32} {len(values):5} values, {min(values, default=math.nan):12.4g} to {max(values, default=math.nan):12.4g}   {query}"
        )
    empty = {title for (title, _), values in drawn.items() if not values}
    assert empty == EMPTY_ON_A_CPU


@pytest.mark.timeout(1800)
def test_what_prometheus_counted_is_what_the_run_says(run):
    """Ray's counters appear with their first value, so a sum over the series is exact; a rate misses that one step."""
    api, totals, began, ended = run
    assert max(api.values("sum(ray_capsfusion_committed_rows)", began, ended)) == totals["rows"]["planned"]
    for outcome in ("fused", "rejected"):
        assert (
            max(api.values(f'sum(ray_capsfusion_rows_total{{outcome="{outcome}"}})', began, ended))
            == totals["rows"][outcome]
        )
    assert max(api.values("sum(ray_capsfusion_units_total)", began, ended)) == totals["units"]
    # Set once, the plan would be gone by then.
    assert max(api.values("sum(ray_capsfusion_committed_rows) / sum(ray_capsfusion_planned_rows)", began, ended)) == 1


@pytest.mark.timeout(1800)
def test_every_alert_rule_is_evaluated_and_none_fires_on_a_sound_run(run):
    api, _, began, ended = run
    wanted = {
        rule["alert"]
        for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
        for rule in group["rules"]
    }
    rules = {rule["name"]: rule for group in api.get("rules")["groups"] for rule in group["rules"]}
    assert rules.keys() == wanted
    for name, rule in rules.items():
        assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), name
        assert rule["state"] != "firing", name
        for metric in re.findall(r"ray_\w+", rule["query"]):
            assert api.values(metric, began, ended), f"{name}: {metric} has no value in a run"
