"""What lets a Prometheus operator and a Grafana pick a run up, as one file: python deploy/monitoring/kubernetes.py prometheus > monitoring.yaml

The argument is the label `release` by which kube-prometheus-stack selects: its Helm release's name. The rules are those of alerts.yaml
and the dashboard is grafana-dashboard.json, as they are; Grafana's sidecar loads a ConfigMap with the label grafana_dashboard.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
NAME = "capsfusion"
DASHBOARD = "grafana-dashboard.json"


def objects(release: str) -> list[dict[str, Any]]:
    """For the namespace that the run is in."""

    def selected() -> dict[str, Any]:
        return {"name": NAME, "labels": {"release": release}}

    pods = {
        # KubeRay puts this label on every Ray pod, head and workers.
        "selector": {"matchLabels": {"ray.io/is-ray-node": "yes"}},
        "podTargetLabels": ["ray.io/cluster"],
        "podMetricsEndpoints": [{"port": "metrics"}],
    }
    dashboard = {"name": f"{NAME}-dashboard", "labels": {"grafana_dashboard": "1"}}
    return [
        {"apiVersion": "monitoring.coreos.com/v1", "kind": "PodMonitor", "metadata": selected(), "spec": pods},
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": selected(),
            "spec": yaml.safe_load((HERE / "alerts.yaml").read_text("utf-8")),
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": dashboard,
            "data": {DASHBOARD: (HERE / DASHBOARD).read_text("utf-8")},
        },
    ]


if __name__ == "__main__":
    yaml.dump_all(objects(sys.argv[1]), sys.stdout, sort_keys=False, width=120)
