"""Write docs/configuration.md from the typed configs: python docs/make_configuration.py. A test holds the two together."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import typing
from pathlib import Path
from typing import Any

from capsfusion_ray.config import FuseConfig, PlanConfig, VerifyConfig, default_of, describe, unwrap_optional
from capsfusion_ray.dataset.export import ExportConfig
from capsfusion_ray.dataset.takedown_criteria import TakedownConfig
from capsfusion_ray.pairing.job import PairConfig
from capsfusion_ray.reports.job import ReportConfig
from capsfusion_ray.reports.terminal import ShowConfig
from capsfusion_ray.training.average import AverageConfig
from capsfusion_ray.training.config import TrainConfig
from capsfusion_ray.training.evaluate import EvaluateConfig
from capsfusion_ray.training.label import LabelConfig

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Configuration

`python jobs/<job>.py [conf/….yaml …] key=value …`: YAML files are merged left to right, then the overrides. What is not given has
the default below; `null` means that the program decides, as the last column says. Made by `python docs/make_configuration.py`.
"""
JOBS = (
    ("jobs/fuse.py", FuseConfig),
    ("jobs/plan.py", PlanConfig),
    ("jobs/pair.py", PairConfig),
    ("jobs/label.py", LabelConfig),
    ("jobs/verify.py", VerifyConfig),
    ("jobs/show.py", ShowConfig),
    ("jobs/report.py", ReportConfig),
    ("jobs/takedown.py", TakedownConfig),
    ("jobs/export.py", ExportConfig),
    ("jobs/train.py", TrainConfig),
    ("jobs/average.py", AverageConfig),
    ("jobs/evaluate.py", EvaluateConfig),
)


def comments(schema: type) -> dict[str, str]:
    """Field -> the comment on its line."""
    found = re.findall(r"^    (\w+): [^#\n]+#\s*(.+)$", inspect.getsource(schema), re.MULTILINE)
    return dict(found)


def rows(section: Any, prefix: str) -> list[str]:
    """A line of the table a key of a section with its defaults; its own sections follow it, under their longer prefix."""
    schema = type(section)
    hints, said, lines = typing.get_type_hints(schema), comments(schema), []
    for field in dataclasses.fields(schema):
        hint, value = unwrap_optional(hints[field.name]), getattr(section, field.name)
        if dataclasses.is_dataclass(hint):
            for inner in dataclasses.fields(hint):
                if dataclasses.is_dataclass(unwrap_optional(typing.get_type_hints(hint)[inner.name])):
                    raise TypeError(f"{schema.__name__}.{field.name}: sections nest at most twice")
                want = describe(typing.get_type_hints(hint)[inner.name])
                note = said.get(field.name, "") if inner.name == "threshold" else comments(hint).get(inner.name, "")
                lines.append(_row(f"{prefix}{field.name}.{inner.name}", want, getattr(value, inner.name), note))
        else:
            lines.append(_row(f"{prefix}{field.name}", describe(hints[field.name]), value, said.get(field.name, "")))
    return lines


def _row(key: str, want: str, value: Any, note: str) -> str:
    shown = json.dumps(value, default=dataclasses.asdict)
    return "| " + " | ".join(part.replace("|", "\\|") for part in (f"`{key}`", want, f"`{shown}`", note)) + " |"


def page() -> str:
    parts = [HEAD]
    for job, schema in JOBS:
        parts.append(f"## {job}\n")
        own = [field for field in dataclasses.fields(schema) if field.name in schema.__annotations__]
        inherits = len(own) < len(dataclasses.fields(schema))
        if inherits:
            parts.append(
                f"The keys of {next(name for name, base in JOBS if base is schema.__base__)}; new, or with other defaults:\n"
            )
        top = [field for field in own if not dataclasses.is_dataclass(typing.get_type_hints(schema)[field.name])]
        sections = [field for field in own if field not in top]
        if top:
            said, hints = comments(schema), typing.get_type_hints(schema)
            lines = [_row(f.name, describe(hints[f.name]), default_of(f), said.get(f.name, "")) for f in top]
            parts.append(_table(lines))
        bases = {field.name: default_of(field) for field in dataclasses.fields(schema.__base__)} if inherits else {}  # type: ignore[arg-type]
        for field in sections:
            hint = typing.get_type_hints(schema)[field.name]
            parts.append(f"### {field.name}\n{inspect.cleandoc(hint.__doc__ or '')}\n")
            known = rows(bases[field.name], f"{field.name}.") if field.name in bases else []
            parts.append(_table([line for line in rows(default_of(field), f"{field.name}.") if line not in known]))
    return "\n".join(parts)


def _table(lines: list[str]) -> str:
    return "\n".join(["| key | wants | default | |", "| --- | --- | --- | --- |", *lines]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stderr.write(f"wrote {PAGE}\n")
