"""For every test: patience with slow machines, and no going green by skipping."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# The packages come without byte code, which is written on first use: where it must not be, each of the hundreds of Ray
# workers of a test run compiles all modules that it imports, 3 s of CPU instead of 1.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Read when triton is imported, which torch may do before the test of the kernel.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile(
    "shared",
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("shared")

pytest_plugins = ["stores"]  # the stores that tests run against

# All that may skip, by the reason that it must give. Any other skip fails the run.
MAY_SKIP = (
    "no published captions at",  # ../shared/data is not part of the project
    "this kind of store cannot promise it",
    "no CUDA device",
    "no KubeRay CRDs at",  # ../shared/kuberay-crds is not part of the project
    "kubectl is not installed",
    "no hosts in namespaces here",
    "no cgroup of its own here",
)
unexpected: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=2, help="of the driver, in tests/jobs -k killed")
    parser.addoption("--kill-engine", choices=("echo", "beam"), default="echo", help="what fuses there")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note(report)


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not any(re.search(allowed, reason) for allowed in MAY_SKIP):
        unexpected.append(f"{report.nodeid}: {reason}")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist ended: a module that it skipped whole is known to it alone."""
    known = getattr(node, "workeroutput", {}).get("unexpected", ())  # a worker that crashed has none
    unexpected.extend(line for line in known if line not in unexpected)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["unexpected"] = unexpected
    if unexpected:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in unexpected:
        terminalreporter.write_line(f"FAILED skipped, and tests/conftest.py does not allow it: {line}", red=True)
