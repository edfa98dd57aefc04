"""Every path of an output is spelled in dataset/layout, and the spelling is that of outputs that exist."""

import ast
import re
from pathlib import Path

import pytest

from capsfusion_ray.core.accounting import STORED
from capsfusion_ray.dataset import layout

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "output_of_0_1"
MODULES = [path for path in sorted((ROOT / "capsfusion_ray").rglob("*.py")) if path.name != "layout.py"]
NAMES = re.compile(
    r"(?:^|/)(?:_run|_units|_retry)(?:/|$)|^(?:manifest|progress|lease)\.json$|^(?:report|comparison)\.html$|^plan-r"
)


def texts(tree):
    """Every string constant but docstrings, pieces of f-strings included."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_module_spells_a_path_of_an_output(path):
    found = [text for text in texts(ast.parse(path.read_text("utf-8"))) if NAMES.search(text)]
    assert not found, f"{path.name} spells {found}; take the name from dataset/layout.py"


def test_the_scan_above_finds_what_it_looks_for():
    found = [
        text for text in texts(ast.parse((ROOT / "capsfusion_ray/dataset/layout.py").read_text())) if NAMES.search(text)
    ]
    assert {"manifest.json", "progress.json", "report.html", "_units", "_retry", "_run"} <= set(found)


def test_the_names_are_those_of_an_output_that_the_first_version_wrote():
    def files(name):
        return {str(path.relative_to(FIXTURE / name)) for path in (FIXTURE / name).rglob("*") if path.is_file()}

    data = {
        layout.data_file_path(layout.data_file_prefix(kind, f"shard={group}", layout.of_plan(1), group), 0)
        for kind in layout.DATA_FOLDERS
        for group in ("g00000", "g00001")
    }
    run = {layout.LEASE, layout.ENGINE_IS_UP, layout.plan_path(1), layout.config_path(1)}
    entries = {layout.group_path(group, 1) for group in ("g00000", "g00001")}
    assert files("finished") == data | run | entries | {layout.MANIFEST, layout.PROGRESS}
    units = {path.stem for path in (FIXTURE / "begun" / layout.UNITS_DIR).iterdir()}
    assert files("begun") == run | {layout.part_path(unit) for unit in units}


@pytest.mark.parametrize("stamp", [layout.of_plan(12), layout.of_edition(12, 3)])
@pytest.mark.parametrize("partition", ["shard=g00007", "lang=en", "lang=__HIVE_DEFAULT_PARTITION__"])
@pytest.mark.parametrize("kind", layout.DATA_FOLDERS)
def test_the_pattern_of_data_files_reads_what_the_names_say(kind, partition, stamp):
    path = layout.data_file_path(layout.data_file_prefix(kind, partition, stamp, "g00007"), 4)
    found = layout.DATA_FILE.fullmatch(path)
    assert found
    assert (found["kind"], int(found["number"]), found["group"] or found["shard"]) == (stamp[0], 12, "g00007")
    assert not layout.DATA_FILE.fullmatch(path.replace("part-", "mine-"))


def test_the_folders_of_data_files_are_those_of_the_accounting():
    assert set(layout.DATA_FOLDERS) == set(STORED)
