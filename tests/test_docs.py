"""What the documents say of the program is what the program is."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_configuration_page_is_made_from_the_configs():
    made = runpy.run_path(str(ROOT / "docs/make_configuration.py"))["page"]()
    assert (ROOT / "docs/configuration.md").read_text("utf-8") == made, "run: python docs/make_configuration.py"


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_every_file_and_target_that_a_page_names_exists(page):
    text = (ROOT / page).read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", text)) - {"it"} <= targets
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    named = re.findall(r"\b((?:jobs|conf|tests|docs|benchmarks|deploy|examples|capsfusion_ray)/[\w./-]+\.(?:py|yaml|md|json))\b", text)
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing
