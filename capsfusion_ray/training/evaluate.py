"""Compare the captions of a model, or of a finished output, with reference captions, and with baselines. Runs an engine.

The last `data.rows` rows of the file are measured; training never sees them. Where a caption is missing, the raw caption
is measured in its place, so that no system gains by leaving hard rows out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capsfusion_ray.config import DecodeConfig, EngineConfig, section, setting
from capsfusion_ray.core.columns import FUSED, RAW, SYNTHETIC
from capsfusion_ray.core.parquet import open_parquet
from capsfusion_ray.core.prompt import PromptBuilder
from capsfusion_ray.core.types import CaptionPair
from capsfusion_ray.engines.base import build_engine
from capsfusion_ray.errors import ConfigError, RowError
from capsfusion_ray.models.inspect import inspect_model, resolve_with_model
from capsfusion_ray.training.figures_file import write_figures
from capsfusion_ray.training.metrics import Example, measure, words_of
from capsfusion_ray.training.triples import Triple, read_all

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReferenceConfig:
    """Caption pairs with the captions that a better model wrote for them."""

    path: str = setting(
        "", "a JSON, JSON lines or Parquet file, a folder of Parquet files, or the output of a job", common=True
    )
    raw: str = setting("laion_2b", "column of the raw caption")
    synthetic: str = setting("laion_coco", "column of the synthetic caption")
    reference: str = setting("capsfuion_official", "this spelling is that of the published example file")
    rows: int = setting(500, "how many of the last rows are measured", common=True)


@dataclass(frozen=True)
class EvaluateOutputConfig:
    """Where the figures are written: `<path>/figures.json`, `figures.md` and `captions.jsonl`. Empty: they are only printed."""

    path: str = setting("", "a folder; empty: print the figures only", common=True)


@dataclass(frozen=True)
class EvaluateConfig:
    """capsfusion evaluate"""

    data: ReferenceConfig = section(ReferenceConfig, required=["path"])
    fused: str = setting(
        "", "the folder of a finished output to measure; empty: the model of `engine` writes the captions", common=True
    )
    engine: EngineConfig = section(EngineConfig)
    decode: DecodeConfig = section(DecodeConfig)
    output: EvaluateOutputConfig = section(EvaluateOutputConfig)


def evaluate(cfg: EvaluateConfig) -> dict[str, Any]:
    """Measure the captions and the baselines, and write the files of `output.path`.

    Returns {rows, measured: the model or the output, system: its name among the figures, figures: by system and figure}.
    Raises ConfigError for a path that holds no captions.
    """
    rows = read_references(cfg.data)
    pairs = [CaptionPair(str(i), triple.raw, triple.synthetic) for i, triple in enumerate(rows)]
    captions = _from_output(cfg.fused, pairs) if cfg.fused else generate(cfg.engine, cfg.decode, pairs)
    name = "output" if cfg.fused else "model"
    systems = _systems(rows, name, [captions.get(p.row_id) or p.raw for p in pairs])
    figures = {system: measure(_examples(rows, texts)) for system, texts in systems.items()}
    measured = cfg.fused or cfg.engine.model or cfg.engine.kind
    result = {"rows": len(rows), "measured": measured, "system": name, "figures": figures}
    missing = sum(not captions.get(p.row_id) for p in pairs)
    LOG.info("%d rows, of which %d have no caption\n%s", len(rows), missing, as_table(figures))
    if cfg.output.path:
        _write(Path(cfg.output.path), result, rows, systems[name])
    return result


def _systems(rows: Sequence[Triple], name: str, captions: list[str]) -> dict[str, list[str]]:
    """The captions of each system: the baselines, the measured system, and the references."""
    pasted = [f"{triple.raw.rstrip(' .')}. {triple.synthetic}" for triple in rows]
    return {
        "raw": [triple.raw for triple in rows],
        "synthetic": [triple.synthetic for triple in rows],
        "raw. synthetic": pasted,
        "extractive oracle": [extractive_oracle(text, triple.fused) for text, triple in zip(pasted, rows, strict=True)],
        name: captions,
        "reference": [triple.fused for triple in rows],
    }


def _examples(rows: Sequence[Triple], captions: Sequence[str]) -> list[Example]:
    return [
        Example(triple.raw, triple.synthetic, text, triple.fused) for triple, text in zip(rows, captions, strict=True)
    ]


def _write(folder: Path, result: dict[str, Any], rows: Sequence[Triple], captions: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_figures(folder, result)
    (folder / "figures.md").write_text(as_table(result["figures"]) + "\n", encoding="utf-8")
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as lines:
        for triple, text in zip(rows, captions, strict=True):
            row = {RAW: triple.raw, SYNTHETIC: triple.synthetic, FUSED: text, "reference": triple.fused}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def extractive_oracle(sources: str, reference: str) -> str:
    """Return the words of the sources that the reference contains, in the order of the sources.

    This is about as near to the reference as a system can get that only leaves words out.
    """
    held = set(words_of(reference))
    return " ".join(word for word in sources.split() if held.intersection(words_of(word)))


def read_references(cfg: ReferenceConfig) -> list[Triple]:
    """Read the last `rows` triples of the file or folder."""
    columns = {"data.raw": cfg.raw, "data.synthetic": cfg.synthetic, "data.reference": cfg.reference}
    return read_all(cfg.path, columns)[-cfg.rows :]


def generate(engine_config: EngineConfig, decode: DecodeConfig, pairs: Sequence[CaptionPair]) -> dict[str, str]:
    """Write a caption for each pair with an engine. Returns captions by row id; a pair that cannot be fused is absent."""
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
    """Read captions of a finished output by row id. Rows are matched by their two sources: the order may differ."""
    files = sorted(Path(path).glob("data/**/*.parquet"))
    if not files:
        raise ConfigError(f"fused={path!r}: the folder has no data/**/*.parquet; give the folder of a finished output")
    wanted = {(p.raw, p.synthetic) for p in pairs}  # only these are kept: the output may have 120 million rows
    by_sources: dict[tuple[str, str], str] = {}
    columns = [RAW, SYNTHETIC, FUSED]
    for file in files:
        with file.open("rb") as source:
            for batch in open_parquet(source, columns, str(file)).iter_batches(columns=columns):
                for raw, synthetic, fused in zip(*(batch[name].to_pylist() for name in columns), strict=True):
                    key = (
                        (raw or "").strip(),
                        (synthetic or "").strip(),
                    )  # stripped, as read_all strips the references
                    if key in wanted:
                        by_sources[key] = fused
    return {p.row_id: by_sources[p.raw, p.synthetic] for p in pairs if (p.raw, p.synthetic) in by_sources}


def as_table(figures: dict[str, dict[str, float]]) -> str:
    """Format the figures as a Markdown table with one line per system and one column per figure."""
    names = list(next(iter(figures.values())))
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in names) + " |", "| --- |" + " --- |" * len(names)]
    for system, values in figures.items():
        cells = (f"{values[name]:.1f}" if name == "words" else f"{values[name]:.3f}" for name in names)
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
