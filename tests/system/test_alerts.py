"""Prometheus' own tool on the alert rules: each fires on what it is for, and not on what a sound run shows."""

import subprocess
from pathlib import Path

HERE = Path(__file__).parent


def test_the_alert_rules_pass_their_unit_tests():
    done = subprocess.run(["promtool", "test", "rules", "alerts_test.yaml"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
