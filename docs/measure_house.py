"""Count how the package is built: rooms, imports between them, levels, long functions. python docs/measure_house.py [CHECKOUT]

A room is a file in the package's root or a folder there; `__init__` counts as a file. Files outside the package are not counted.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = "capsfusion_ray"
LONG_FUNCTION_LINES = 40


def modules(checkout: Path) -> dict[str, Path]:
    """Dotted name -> file, for every module of the package."""
    files = sorted((checkout / PACKAGE).rglob("*.py"))
    return {
        ".".join(file.relative_to(checkout).with_suffix("").parts).removesuffix(".__init__"): file for file in files
    }


def imports(name: str, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that module `name` imports, at its head or inside a function."""
    for node in ast.walk(ast.parse(known[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [each if each in known else node.module for each in names]
        else:
            continue
        yield from (each for each in names if each in known and each != name)


def room(name: str) -> str:
    return [*name.split("."), "__init__"][1]


def long_functions(known: dict[str, Path]) -> list[tuple[int, str]]:
    """(lines, module:function) of each function over LONG_FUNCTION_LINES lines."""
    found = []
    for name, file in known.items():
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                lines = node.end_lineno - node.lineno + 1
                if lines > LONG_FUNCTION_LINES:
                    found.append((lines, f"{name}:{node.name}"))
    return sorted(found, reverse=True)


def measure(checkout: Path) -> dict[str, int]:
    """The counts, by name."""
    known = modules(checkout)
    files = {(name, other) for name in known for other in imports(name, known)}
    pairs = {(room(a), room(b)) for a, b in files if room(a) != room(b)}

    @cache
    def level(of: str) -> int:
        visiting.add(of)
        below = [level(b) for a, b in pairs if a == of and b not in visiting]
        visiting.discard(of)
        return 1 + max(below, default=0)

    visiting: set[str] = set()
    return {
        "files": len(known),
        "folders": len({file.parent for file in known.values()}),
        "files in the package root": len(list((checkout / PACKAGE).glob("*.py"))),
        "rooms": len({room(name) for name in known}),
        "imports between rooms": len(pairs),
        "levels": max(level(room(name)) for name in known),
        "imports between files": len(files),
        f"functions over {LONG_FUNCTION_LINES} lines": len(long_functions(known)),
    }


if __name__ == "__main__":
    here = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[1])
    for title, count in measure(here).items():
        print(f"{count:6,}  {title}")
    for lines, function in long_functions(modules(here)):
        print(f"        {lines} lines: {function}")
