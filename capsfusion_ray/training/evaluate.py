"""Compare a model, or a finished output, with reference captions, always beside the baselines. Top layer: runs an engine.

The rows measured are the last `data.rows` of the file, which training never sees. A caption that is missing counts as the
raw one, so that no system gains by leaving hard rows out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.core.columns import FUSED, RAW, SYNTHETIC
from capsfusion_ray.core.parquet import open_parquet
from capsfusion_ray.core.prompt import PromptBuilder
from capsfusion_ray.core.types import CaptionPair
from capsfusion_ray.engines.base import build_engine
from capsfusion_ray.errors import ConfigError, RowError
from capsfusion_ray.models.inspect import inspect_model, resolve_with_model
from capsfusion_ray.training.metrics import FIGURES, Example, measure, words_of
from capsfusion_ray.training.triples import Triple, read_all

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReferenceConfig:
    """Caption pairs with the captions that a better model wrote for them."""

    path: str = ""  # a JSON, JSON lines or Parquet file, a folder of Parquet files, or the output of a job
    raw: str = "laion_2b"
    synthetic: str = "laion_coco"
    reference: str = "capsfuion_official"  # spelled so in the published example file
    rows: int = 500  # the last ones


@dataclass(frozen=True)
class EvaluateOutputConfig:
    """Where the figures go: `<path>/figures.json`, `figures.md` and `captions.jsonl`. Empty: nowhere but the terminal."""

    path: str = ""


@dataclass(frozen=True)
class EvaluateConfig:
    """jobs/evaluate.py."""

    data: ReferenceConfig = field(default_factory=ReferenceConfig)
    fused: str = ""  # a finished output to measure (its folder); empty: the model of `engine` writes the captions
    engine: EngineConfig = field(default_factory=EngineConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    output: EvaluateOutputConfig = field(default_factory=EvaluateOutputConfig)


def evaluate(cfg: EvaluateConfig) -> dict[str, Any]:
    """{rows, measured: the model or output, system: its name in figures, figures: by system, the baselines too}.

    Writes the files that `output.path` asks for.
    """
    rows = read_references(cfg.data)
    pairs = [CaptionPair(str(i), triple.raw, triple.synthetic) for i, triple in enumerate(rows)]
    captions = _from_output(cfg.fused, pairs) if cfg.fused else generate(cfg.engine, cfg.decode, pairs)
    name = "output" if cfg.fused else "model"
    pasted = [f"{p.raw.rstrip(' .')}. {p.synthetic}" for p in pairs]
    systems = {
        "raw": [p.raw for p in pairs],
        "synthetic": [p.synthetic for p in pairs],
        "raw. synthetic": pasted,
        "extractive oracle": [extractive_oracle(text, triple.fused) for text, triple in zip(pasted, rows, strict=True)],
        name: [captions.get(p.row_id) or p.raw for p in pairs],
        "reference": [triple.fused for triple in rows],
    }
    figures = {
        system: measure(
            [
                Example(triple.raw, triple.synthetic, text, triple.fused)
                for triple, text in zip(rows, texts, strict=True)
            ]
        )
        for system, texts in systems.items()
    }
    measured = cfg.fused or cfg.engine.model or cfg.engine.kind
    result = {"rows": len(rows), "measured": measured, "system": name, "figures": figures}
    table = as_table(figures)
    LOG.info("%d rows, %d captions missing\n%s", len(rows), sum(not captions.get(p.row_id) for p in pairs), table)
    if cfg.output.path:
        folder = Path(cfg.output.path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FIGURES).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (folder / "figures.md").write_text(table + "\n", encoding="utf-8")
        with (folder / "captions.jsonl").open("w", encoding="utf-8") as lines:
            for triple, text in zip(rows, systems[name], strict=True):
                row = {RAW: triple.raw, SYNTHETIC: triple.synthetic, FUSED: text, "reference": triple.fused}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return result


def extractive_oracle(sources: str, reference: str) -> str:
    """The words of the sources that the reference holds too, in their order: about as near to it as leaving out alone can get."""
    held = set(words_of(reference))
    return " ".join(word for word in sources.split() if held.intersection(words_of(word)))


def read_references(cfg: ReferenceConfig) -> list[Triple]:
    """The last triples of the file or folder."""
    columns = {"data.raw": cfg.raw, "data.synthetic": cfg.synthetic, "data.reference": cfg.reference}
    return read_all(cfg.path, columns)[-cfg.rows :]


def generate(engine_config: EngineConfig, decode: DecodeConfig, pairs: Sequence[CaptionPair]) -> dict[str, str]:
    """The engine's own text for each pair, by row id; a pair that cannot be fused is absent."""
    info = inspect_model(engine_config)
    engine_config, decode = resolve_with_model(engine_config, decode, info)
    engine = build_engine(engine_config, decode)
    built = PromptBuilder(info.template, engine.encode, engine_config.max_prompt_tokens).build(pairs)
    engine.submit([prompt for prompt in built if not isinstance(prompt, RowError)])
    captions: dict[str, str] = {}
    while engine.unfinished:
        for generation in engine.step():
            if not generation.error:
                captions[generation.id] = generation.text
    return captions


def _from_output(path: str, pairs: Sequence[CaptionPair]) -> dict[str, str]:
    """Captions of a finished output, matched by their two sources: the output may hold more rows, in another order."""
    files = sorted(Path(path).glob("data/**/*.parquet"))
    if not files:
        raise ConfigError(f"fused={path!r}: no data/**/*.parquet in it; give the folder of a finished output")
    wanted = {(p.raw, p.synthetic) for p in pairs}  # of an output that may hold 120 million
    by_sources: dict[tuple[str, str], str] = {}
    columns = [RAW, SYNTHETIC, FUSED]
    for file in files:
        with file.open("rb") as source:
            for batch in open_parquet(source, columns, str(file)).iter_batches(columns=columns):
                for raw, synthetic, fused in zip(*(batch[name].to_pylist() for name in columns), strict=True):
                    if (
                        key := ((raw or "").strip(), (synthetic or "").strip())
                    ) in wanted:  # as the references are read
                        by_sources[key] = fused
    return {p.row_id: by_sources[p.raw, p.synthetic] for p in pairs if (p.raw, p.synthetic) in by_sources}


def as_table(figures: dict[str, dict[str, float]]) -> str:
    """Markdown: a line a system, a column a figure."""
    names = list(next(iter(figures.values())))
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in names) + " |", "| --- |" + " --- |" * len(names)]
    for system, values in figures.items():
        cells = (f"{values[name]:.1f}" if name == "words" else f"{values[name]:.3f}" for name in names)
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
