"""The demo's captions as the embedded model is asked: token ids, for programs that know nothing of this package.

python tests/support/demo_prompts.py > prompts.json
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from capsfusion_ray import sources
from capsfusion_ray.config import DecodeConfig, EngineConfig, FuseConfig, parse_config
from capsfusion_ray.core.columns import RAW, ROW_ID, SYNTHETIC
from capsfusion_ray.core.prompt import PromptBuilder
from capsfusion_ray.core.types import CaptionPair, Prompt
from capsfusion_ray.engines.loading import LoadedModel, load_model
from capsfusion_ray.models.inspect import inspect_model, resolve_with_model

ROOT = Path(__file__).resolve().parents[2]


def demo_pairs() -> list[CaptionPair]:
    """Those of examples/captions that have both captions."""
    cfg = parse_config(
        FuseConfig, [str(ROOT / "conf/demo.yaml"), f"input.path={ROOT / 'examples/captions'}", "output.path=unused"]
    )
    shards = [shard for shard in sources.discover(cfg.input, cfg.source) if not shard.error]
    spec = sources.ReadSpec(sources.frozen_schema(shards, cfg.source, cfg.filter), cfg.source, cfg.filter)
    tables = [sources.read_rows(shard, 0, shard.rows, spec).table for shard in shards]
    rows = [
        row
        for table in tables
        for row in zip(*(table[name].to_pylist() for name in (ROW_ID, RAW, SYNTHETIC)), strict=True)
    ]
    return [CaptionPair(row_id, raw, synthetic) for row_id, raw, synthetic in rows if raw and synthetic]


def embedded() -> tuple[LoadedModel, EngineConfig]:
    """The embedded model on the CPU in float32, and how it is asked."""
    engine = EngineConfig(device="cpu", dtype="float32")
    resolved, _ = resolve_with_model(engine, DecodeConfig(), inspect_model(engine))
    return load_model(resolved), resolved


def prompts_of(pairs: Sequence[CaptionPair], model: LoadedModel, engine: EngineConfig) -> list[Prompt]:
    """In order, without those that no truncation fits."""
    builder = PromptBuilder(
        inspect_model(engine).template, lambda texts: model.encode(list(texts)), engine.max_prompt_tokens
    )
    return [prompt for prompt in builder.build(pairs) if isinstance(prompt, Prompt)]


if __name__ == "__main__":
    print(json.dumps([list(prompt.prefix_ids + prompt.suffix_ids) for prompt in prompts_of(demo_pairs(), *embedded())]))
