"""Write the Kubernetes objects with which Prometheus and Grafana watch a run: python deploy/monitoring/kubernetes.py prometheus > monitoring.yaml

The argument is the name of the Helm release of kube-prometheus-stack: the stack selects objects by the label `release`. The
rules are those of alerts.yaml, and the dashboard is grafana-dashboard.json. Grafana's sidecar loads every ConfigMap that has
the label grafana_dashboard.
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
    """Return a PodMonitor, a PrometheusRule and a ConfigMap. Apply them in the namespace of the run."""

    def selected() -> dict[str, Any]:
        return {"name": NAME, "labels": {"release": release}}

    pods = {
        # KubeRay puts this label on every Ray pod, on the head and on the workers.
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
