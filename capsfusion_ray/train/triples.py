"""Read the triples, drop the faulty ones, keep the validation rows apart. Knows no torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from capsfusion_ray.config import GatesConfig
from capsfusion_ray.errors import SourceError
from capsfusion_ray.gates import judge_text
from capsfusion_ray.rows import FLAGS, Outcome, Reason
from capsfusion_ray.stages import KEPT
from capsfusion_ray.train.config import TripleConfig

_GOOD_ENDING = re.compile(r"""[.!?]["'”’)]*$""")
_GATES = GatesConfig()


@dataclass(frozen=True, slots=True)
class Triple:
    """A raw and a synthetic caption, and the caption a teacher fused them into."""

    raw: str
    synthetic: str
    fused: str


def read_triples(cfg: TripleConfig) -> tuple[list[Triple], list[Triple]]:
    """Training triples without the faulty ones, and the validation triples as they are."""
    path = Path(cfg.path)
    if path.is_dir():  # an output of jobs/label.py or jobs/fuse.py, or a folder of Parquet files
        files = sorted((path / "data" if (path / "data").is_dir() else path).rglob("*.parquet"))
        rows = [row for file in files for row in _read_parquet(file, cfg)]
    elif path.suffix == ".parquet":
        rows = _read_parquet(path, cfg)
    elif path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
    else:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        triples = [Triple(*(str(row[k]).strip() for k in (cfg.raw, cfg.synthetic, cfg.fused))) for row in rows]
    except KeyError as error:
        raise SourceError(
            f"{path}: a row has no column {error}; set data.raw, data.synthetic and data.fused"
        ) from error
    if len(triples) <= cfg.validation_rows:
        raise SourceError(
            f"{path}: {len(triples)} triples; data.validation_rows={cfg.validation_rows} leaves none to train on"
        )
    cut = len(triples) - cfg.validation_rows
    return [triple for triple in triples[:cut] if is_sound(triple)], triples[cut:]


def _read_parquet(path: Path, cfg: TripleConfig) -> list[dict[str, Any]]:
    """Rows of one file; those that kept one source as it is are no fused captions."""
    names = pq.read_schema(path).names
    missing = [name for name in (cfg.raw, cfg.synthetic, cfg.fused) if name not in names]
    if missing:
        raise SourceError(f"{path}: no columns {missing}; it has {names}; set data.raw, data.synthetic and data.fused")
    flags = [FLAGS] if FLAGS in names else []
    rows = pq.ParquetFile(path).read(columns=[cfg.raw, cfg.synthetic, cfg.fused, *flags]).to_pylist()
    return [row for row in rows if KEPT not in (row.get(FLAGS) or ())]


def is_sound(triple: Triple) -> bool:
    """Whether a student should learn from this triple: a whole sentence, that the job's own gates let pass."""
    return bool(
        triple.raw
        and triple.synthetic
        and _GOOD_ENDING.search(triple.fused)
        and len(triple.fused.split()) >= 5
        and passes(triple)
    )


def passes(triple: Triple) -> bool:
    """Whether no gate rejects the fused caption, nor finds even a hint of the instruction in it.

    3.6 % of the published captions talk about the instruction. A hint is only flagged in a single output; a student
    that learns many of them says two at a time.
    """
    verdict = judge_text(triple.raw, triple.synthetic, triple.fused, None, _GATES)
    return verdict.outcome is Outcome.FUSED and Reason.INSTRUCTION_ECHO not in verdict.flags
