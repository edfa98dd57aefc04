"""Imports go down only: the house of docs/architecture.md, enforced."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "capsfusion_ray"

# Lower floors first; a module may import its own floor's packages' insides and every floor below, never one above.
FLOORS = [
    ("words", ["rows", "errors", "config", "parquet"]),
    ("pure rules", ["presets", "plan", "prompt", "provenance", "gates", "units", "pairing", "repeats"]),
    (
        "the world",
        [
            "storage",
            "sources",
            "models",
            "modelcache",
            "parts",
            "manifest",
            "planfile",
            "lease",
            "attempts",
            "files",
            "compact",
            "rewrite",
            "verify",
            "stages",
            "exchange",
        ],
    ),
    ("engines", ["engines"]),
    (
        "the run",
        [
            "actors",
            "starts",
            "preemption",
            "pipeline",
            "cluster",
            "compactor",
            "monitor",
            "progress",
            "calibrate",
            "estimate",
            "revision",
            "retry",
            "repair",
            "run",
            "join",
            "pair",
        ],
    ),
    ("after", ["export", "takedown", "report", "showcase", "metrics", "evaluate", "train", "label", "doorway"]),
]
FLOOR = {room: height for height, (_, rooms) in enumerate(FLOORS) for room in rooms}
RAY_ROOMS = {
    "preemption",
    "starts",
    "pipeline",
    "monitor",
    "calibrate",
    "retry",
    "join",
    "cluster",
    "compactor",
    "train",
}
TORCH_ROOMS = {"engines", "train", "evaluate", "actors"}  # actors asks torch for the device's name


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    here = FLOOR[room(path)]  # a KeyError: a new room has no floor yet
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "capsfusion_ray" and len(parts) > 1 and parts[1] in FLOOR:
            assert FLOOR[parts[1]] <= here, f"{path.name} ({FLOORS[here][0]}) imports {parts[1]} from above"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_ray_and_torch_stay_in_their_rooms(path):
    roots = {name.split(".")[0] for name in imports(path)}
    if room(path) not in RAY_ROOMS:
        assert "ray" not in roots
    if room(path) not in TORCH_ROOMS:
        assert not roots & {"torch"}


def test_what_a_worker_imports_brings_no_model_library():
    """Ray starts a process for each actor, reader and committer: torch in all of them would be GBs and seconds for nothing."""
    look = "import sys, capsfusion_ray.pipeline; sys.exit(bool({'torch', 'transformers', 'tokenizers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", look], check=False).returncode == 0


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_is_read_by_threads_that_outlive_the_call(path):
    """`pq.read_table` lets a file object go in a thread of its own, perhaps after Python has gone: the process then ends
    by SIGABRT (apache/arrow#33975; seen here in one of three `jobs/verify.py`). `pq.ParquetFile(file).read()` does not."""
    assert "read_table(" not in path.read_text("utf-8")


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.name != "parquet.py"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_parquet_files_are_opened_in_one_place(path):
    """pyarrow's own readers resolve extension types, and some of these run code that the file holds."""
    found = re.findall(
        r"\bpq\.(?:ParquetFile|ParquetDataset|read_\w+)\(|\bipc\.read_schema|\bpyarrow\.dataset|\bdatasets\.load",
        path.read_text("utf-8"),
    )
    assert not found, "use capsfusion_ray.parquet"
