"""Read the triples, drop those that a student should not learn from, and separate the validation rows. Knows no torch."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from capsfusion_ray.config import GatesConfig
from capsfusion_ray.core.columns import FLAGS
from capsfusion_ray.core.gates import judge_text
from capsfusion_ray.core.parquet import open_parquet, read_footer
from capsfusion_ray.core.types import Outcome, Reason
from capsfusion_ray.core.unit_steps import KEPT
from capsfusion_ray.errors import ConfigError, SourceError
from capsfusion_ray.training.config import TripleConfig

log = logging.getLogger(__name__)
_GOOD_ENDING = re.compile(r"""[.!?]["'”’)]*$""")
_GATES = GatesConfig()


@dataclass(frozen=True, slots=True)
class Triple:
    """A raw caption, a synthetic caption, and the caption that a teacher fused them into."""

    raw: str
    synthetic: str
    fused: str


def read_triples(cfg: TripleConfig) -> tuple[list[Triple], list[Triple]]:
    """Return the training triples without the faulty ones, and the validation triples as they are.

    Raises SourceError for a file with no more triples than data.validation_rows.
    """
    triples = read_all(cfg.path, {"data.raw": cfg.raw, "data.synthetic": cfg.synthetic, "data.fused": cfg.fused})
    if len(triples) <= cfg.validation_rows:
        raise SourceError(
            f"{cfg.path}: {len(triples)} triples; data.validation_rows={cfg.validation_rows} leaves none to train on"
        )
    cut = len(triples) - cfg.validation_rows
    return [triple for triple in triples[:cut] if is_sound(triple)], triples[cut:]


def located(source: str) -> Path:
    """Return data.path as a path. Raises ConfigError if it does not exist."""
    path = Path(source)
    if not source or not path.exists():
        raise ConfigError(
            f"data.path={source!r}: no such file or folder; give a JSON, JSON lines or Parquet file of triples, or the output of `capsfusion label`"
        )
    return path


def read_all(source: str, columns: dict[str, str]) -> list[Triple]:
    """Read all triples of a JSON array, JSON lines or Parquet file, of a folder of Parquet files, or of an output.

    `columns` maps the config key of raw, synthetic and fused caption to the name of its column. Raises ConfigError if
    `source` does not exist, SourceError for a missing column.
    """
    path, names = located(source), list(columns.values())
    if path.is_dir():
        files = sorted((path / "data" if (path / "data").is_dir() else path).rglob("*.parquet"))
        rows = [row for file in files for row in _read_parquet(file, columns)]
    elif path.suffix == ".parquet":
        rows = _read_parquet(path, columns)
    elif path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
    else:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        texts = [[row[name] for name in names] for row in rows]
        whole = [Triple(*(str(text).strip() for text in three)) for three in texts if None not in three]
        if len(whole) < len(texts):
            log.warning(
                "%s: %d of %d rows have a null caption and are left out", path, len(texts) - len(whole), len(texts)
            )
        return whole
    except KeyError as error:
        raise SourceError(f"{path}: a row has no column {error}; set {', '.join(columns)}") from error


def _read_parquet(path: Path, columns: dict[str, str]) -> list[dict[str, Any]]:
    """Read the rows of one file, without those whose caption is a source that was kept (core.unit_steps.KEPT)."""
    with path.open("rb") as source:
        return _rows_of(path, source, columns)


def _rows_of(path: Path, source: BinaryIO, columns: dict[str, str]) -> list[dict[str, Any]]:
    names, wanted = read_footer(source).schema.names, list(columns.values())
    missing = [name for name in wanted if name not in names]
    if missing:
        raise SourceError(f"{path}: the file has no columns {missing}, only {names}; set {', '.join(columns)}")
    flags = [FLAGS] if FLAGS in names else []
    rows = open_parquet(source, [*wanted, *flags], str(path)).read(columns=[*wanted, *flags]).to_pylist()
    return [row for row in rows if KEPT not in (row.get(FLAGS) or ())]


def is_sound(triple: Triple) -> bool:
    """Return whether a student should learn from this triple: its caption is a whole sentence, and no gate rejects it."""
    return bool(
        triple.raw
        and triple.synthetic
        and _GOOD_ENDING.search(triple.fused)
        and len(triple.fused.split()) >= 5
        and passes(triple)
    )


def passes(triple: Triple) -> bool:
    """Return whether no gate rejects the fused caption or finds a hint of the instruction in it.

    3.6 % of the published captions talk about the instruction. In an output the gate only flags such a hint. A student
    that learns from many of them writes two hints in one caption.
    """
    verdict = judge_text(triple.raw, triple.synthetic, triple.fused, None, _GATES)
    return verdict.outcome is Outcome.FUSED and Reason.INSTRUCTION_ECHO not in verdict.flags
