"""A floor is a folder, and imports go down only. This test knows the floors and no file: a new file needs no edit here."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "capsfusion_ray"
sys.path.insert(0, str(ROOT / "docs"))
from measure_house import imports, measure, modules, room  # noqa: E402

# Lowest floor first. Rooms of one floor do not import each other.
FLOORS = (
    ("errors",),
    ("config",),
    ("core", "storage"),
    ("sources", "models"),
    ("dataset", "engines"),
    ("run",),
    ("pairing", "training"),
    ("reports",),
    ("api",),
    ("cli", "__init__"),
    ("__main__",),
)
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
# The folders and files that may import a heavy library; a name stands for all that is below it.
MAY_IMPORT = {
    "ray": ("run", "pairing/ray_join", "training/job"),
    "torch": ("engines", "training"),
    "transformers": ("engines", "training", "run/quote"),
}
MODULES = modules(ROOT)


def in_house(name: str) -> str:
    """`capsfusion_ray.run.executors.local` -> `run/executors/local`."""
    return "/".join(name.split(".")[1:])


@pytest.mark.parametrize("name", MODULES, ids=in_house)
def test_imports_go_down_only(name: str) -> None:
    here = room(name)
    assert here in HEIGHT, f"{here}: a new folder needs a floor in FLOORS"
    for other in imports(name, MODULES):
        there = room(other)
        if there not in (here, "__init__"):  # the package itself is its version and its lazy names
            assert HEIGHT[there] < HEIGHT[here], f"{in_house(name)} imports {in_house(other)}, which is not below it"


def test_no_folder_has_a_cycle_inside() -> None:
    below = {name: set(imports(name, MODULES)) for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' -> '.join(map(in_house, (*path[path.index(name) :], name)))}"
        if name not in done:
            for other in below[name]:
                if other != "capsfusion_ray":
                    visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("name", MODULES, ids=in_house)
def test_heavy_libraries_stay_in_their_rooms(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text("utf-8"))
    roots = {
        each.split(".")[0]
        for node in ast.walk(tree)
        for each in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
    }
    for library, rooms in MAY_IMPORT.items():
        if not any(in_house(name) == place or in_house(name).startswith(f"{place}/") for place in rooms):
            assert library not in roots, f"{in_house(name)} imports {library}; only {', '.join(rooms)} may"


@pytest.mark.parametrize("name", ["capsfusion_ray.run.executors.local", "capsfusion_ray.run.driver"], ids=in_house)
def test_a_local_run_imports_no_ray(name: str) -> None:
    """Neither this file nor any that it imports, at its head or in a function; the table of executors holds lazy paths."""
    found, left = {name}, [name]
    while left:
        new = set(imports(left.pop(), MODULES)) - found
        found |= new
        left += new
    for other in sorted(found):
        assert not re.search(r"^\s*(?:import|from) ray\b", MODULES[other].read_text("utf-8"), re.MULTILINE), in_house(
            other
        )


def test_the_house_stays_small() -> None:
    """The figures that docs/architecture.md gives, as upper bounds: python docs/measure_house.py."""
    counts = measure(ROOT)
    assert counts["imports between rooms"] <= 80
    assert counts["levels"] <= 10
    assert counts["files in the package root"] <= 4


def test_what_a_worker_imports_brings_no_model_library() -> None:
    """Ray starts a process for each actor, reader and committer: torch in all of them would be GBs and seconds for nothing."""
    look = "import sys, capsfusion_ray.run.pipeline; sys.exit(bool({'torch', 'transformers', 'tokenizers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", look], check=False).returncode == 0


@pytest.mark.parametrize("name", MODULES, ids=in_house)
def test_no_file_is_read_by_threads_that_outlive_the_call(name: str) -> None:
    """`pq.read_table` lets a file object go in a thread of its own, perhaps after Python has gone: the process then ends
    by SIGABRT (apache/arrow#33975; seen here in one of three runs of verify). `ParquetFile.read()` does not."""
    assert "read_table(" not in MODULES[name].read_text("utf-8")


@pytest.mark.parametrize("name", [name for name in MODULES if in_house(name) != "core/parquet"], ids=in_house)
def test_parquet_files_are_opened_in_one_place(name: str) -> None:
    """pyarrow's own readers resolve extension types, and some of these run code that the file holds."""
    pattern = r"\bpq\.(?:ParquetFile|ParquetDataset|read_\w+)\(|\bipc\.read_schema|\bdatasets\.load"
    assert not re.findall(pattern, MODULES[name].read_text("utf-8")), "use capsfusion_ray.core.parquet"
