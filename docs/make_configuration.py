"""Write docs/configuration.md from the config dataclasses: python docs/make_configuration.py. A test compares the two."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import typing
from pathlib import Path
from typing import Any

from capsfusion_ray.config import FuseConfig, PlanConfig, VerifyConfig
from capsfusion_ray.config.keys import Key, keys_of
from capsfusion_ray.dataset.export import ExportConfig
from capsfusion_ray.dataset.takedown_criteria import TakedownConfig
from capsfusion_ray.pairing.config import PairConfig
from capsfusion_ray.reports.job import ReportConfig
from capsfusion_ray.reports.terminal import ShowConfig
from capsfusion_ray.training.average import AverageConfig
from capsfusion_ray.training.config import TrainConfig
from capsfusion_ray.training.evaluate import EvaluateConfig
from capsfusion_ray.training.label import LabelConfig

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Configuration

`capsfusion <job> [conf/….yaml …] key=value …`: YAML files are merged from left to right, then the overrides. A key that is not
given has the default below; `null` means that the program decides, as the last column says. Each job lists first the keys that
people set, then those for experts. `capsfusion <job> --help` prints the same lists. Made by `python docs/make_configuration.py`.
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


def page() -> str:
    """The whole page."""
    names = {schema: job for job, schema in JOBS}
    parts = [HEAD]
    for job, schema in JOBS:
        base = schema.__base__ if schema.__base__ in names else None
        parts.append(f"## {job}\n{_own_doc(schema)}\n")
        if base:
            parts.append(f"It has the keys of {names[base]}. These are new or have other defaults:\n")
        known = [_row(key) for key in keys_of(base)] if base else []
        keys = [key for key in keys_of(schema) if key.wants != "section" and _row(key) not in known]
        common, expert = [key for key in keys if key.common], [key for key in keys if not key.common]
        if common:
            parts += [f"### {job}: keys that people set\n", _table(common)]
        if expert:
            parts += [f"### {job}: keys for experts\n", *_sections(schema, expert)]
    return "\n".join(parts)


def _sections(schema: type, keys: list[Key]) -> list[str]:
    """A table of the job's own keys, then one table per section under the text of that section."""
    parts = []
    hints = typing.get_type_hints(schema)
    for section in dict.fromkeys(["", *(field.name for field in dataclasses.fields(schema))]):
        if listed := [key for key in keys if key.section == section]:
            if section:
                parts.append(f"**{section}**: {_own_doc(hints[section])}\n")
            parts.append(_table(listed))
    return parts


def _own_doc(schema: type) -> str:
    return inspect.cleandoc(schema.__doc__ or "")


def _row(key: Key) -> str:
    default = json.dumps(key.default, default=dataclasses.asdict)
    return (
        "| "
        + " | ".join(part.replace("|", "\\|") for part in (f"`{key.name}`", key.wants, f"`{default}`", key.text))
        + " |"
    )


def _table(keys: list[Key]) -> str:
    return "\n".join(["| key | wants | default | what it does |", "| --- | --- | --- | --- |", *map(_row, keys)]) + "\n"


def _write(path: Path, text: Any) -> None:
    path.write_text(text, encoding="utf-8")
    sys.stderr.write(f"wrote {path}\n")


if __name__ == "__main__":
    _write(PAGE, page())
