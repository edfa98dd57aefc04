"""Write README's map of the files from the first line of each module's docstring: python docs/make_file_map.py"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- made by docs/make_file_map.py: do not edit below -->", "<!-- end of the file map -->"
TOP = {
    "jobs/": "one small script per job, for `ray job submit`; each does the same as the command `capsfusion <job>`",
    "conf/": "settings to start from, as YAML files",
    "deploy/": "the container image, Kubernetes manifests, dashboards and alerts",
    "tests/": "a module's tests are in the folder of the same name; `jobs/` runs whole jobs, `chaos/` injects faults for an hour",
    "benchmarks/": "every figure of speed, memory and exactness, with the script that measured it",
    "examples/": "the captions of the demo",
    "models/": "the embedded model and its card",
    "docs/": "the pages, and the scripts that write the generated ones",
}


def first_line(file: Path) -> str:
    """The first paragraph's first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()).replace("|", "\\|")


def file_map() -> str:
    """The map: top-level folders, then each folder of the package with its files."""
    lines = ["| folder | holds |", "| --- | --- |", *(f"| `{name}` | {holds} |" for name, holds in TOP.items())]
    lines += ["", "The package (click a folder):", ""]
    package = ROOT / "capsfusion_ray"
    folders = sorted({file.parent for file in package.rglob("*.py")})
    for folder in folders:
        files = [file for file in sorted(folder.glob("*.py")) if file.name != "__init__.py"]
        title = f"{folder.relative_to(ROOT).as_posix()}/"
        lines += ["<details>", f"<summary><code>{title}</code> {first_line(folder / '__init__.py')}</summary>", ""]
        lines += ["| file | does |", "| --- | --- |", *(f"| `{file.name}` | {first_line(file)} |" for file in files)]
        lines += ["", "</details>", ""]
    return "\n".join(lines)


def page() -> str:
    """README with its map made anew."""
    text = README.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{file_map()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    README.write_text(page(), "utf-8")
