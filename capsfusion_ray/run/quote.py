"""jobs/plan.py: what a fuse run would do, take and cost, from the listing, the footers and a sample. Writes nothing."""

from __future__ import annotations

import dataclasses
import logging
import sys
from typing import Any, Literal

from capsfusion_ray import sources
from capsfusion_ray.config import EngineConfig, FuseConfig, PlanConfig
from capsfusion_ray.core.columns import RAW, ROW_ID, SYNTHETIC
from capsfusion_ray.core.cost_model import GUESSED_SLOTS, Estimate
from capsfusion_ray.core.prompt import PromptBuilder
from capsfusion_ray.core.types import CaptionPair
from capsfusion_ray.dataset.manifest import read_groups
from capsfusion_ray.dataset.plan_files import read_plans
from capsfusion_ray.dataset.unit_files import committed
from capsfusion_ray.errors import SourceError
from capsfusion_ray.models.cache import folder_of
from capsfusion_ray.models.inspect import resolve_with_model
from capsfusion_ray.run import cluster
from capsfusion_ray.run.calibrate import calibrate
from capsfusion_ray.run.survey import OutputState, Survey, next_plan, read_spec, speed, survey
from capsfusion_ray.storage import Store

log = logging.getLogger(__name__)
SAMPLE_ROWS = 400  # of the input, to count tokens and to calibrate
OUTPUT_PER_SUFFIX_TOKEN = 36 / 46  # mean fused tokens over mean caption tokens of a prompt, published examples (SPEC)


def estimate(cfg: PlanConfig) -> dict[str, Any]:
    """The plan that jobs/fuse.py would make now, and its price. Raises what the survey of a fuse run raises."""
    found = survey(cfg)
    store = Store(cfg.output.path, cfg.output.storage)
    gpus, actors = expected_pool(cfg)
    device: Literal["cuda", "cpu"] = "cuda" if gpus else "cpu"
    engine, decode = resolve_with_model(cfg.engine, cfg.decode, found.model)
    if cfg.calibrate:
        if not (pairs := sample(cfg, found)):
            raise SourceError(
                f"input.path={cfg.input.path}: no row of the sample has both captions; nothing to calibrate with"
            )
        measured = calibrate(dataclasses.replace(cfg, engine=engine, decode=decode), found.model.template, pairs)
        device, gpus = measured.device, gpus or 1.0 if measured.device == "cuda" else 0.0
    dtype = engine.dtype if engine.dtype != "auto" else ("bfloat16" if device == "cuda" else "float32")
    cfg = dataclasses.replace(cfg, engine=dataclasses.replace(engine, device=device, dtype=dtype), decode=decode)
    before = read_plans(store)
    plan = next_plan(cfg, found, device, before)
    begun = OutputState(store, before, read_groups(store), committed(store)) if before else OutputState(store, [], [])
    left = [*begun.pending, *plan.units]
    rows = sum(unit.rows for unit in left)
    if cfg.calibrate:
        together = measured.together
        captions_per_s, source = measured.captions_per_s, f"measured: {measured.captions} captions by one actor here"
        tokens = measured.prompt_tokens, measured.output_tokens
    else:
        together = together_of(cfg.engine, device)
        captions_per_s = speed(cfg, device)
        source = "unit.captions_per_s" if cfg.unit.captions_per_s else f"guess for {cfg.engine.kind} on {device}"
        tokens = expected_tokens(cfg, found, sample(cfg, found))
    quote = Estimate(
        rows=rows,
        units=len(left),
        actors=max(min(actors, len(left)), 1),
        captions_per_s=captions_per_s,
        prompt_tokens=tokens[0],
        output_tokens=tokens[1],
        gpus_per_actor=gpus,
        price_per_gpu_hour=cfg.cluster.price_per_gpu_hour,
        speed_source=source,
        errors={shard.path: shard.error for shard in found.shards if shard.error},
        rows_done=begun.planned_rows + plan.rows - rows,
        preempted_every_h=cfg.preempted_every_h,
        restart_s=cfg.restart_s,
        captions_in_flight=together,
    )
    return dataclasses.asdict(quote) | {
        "seconds": round(quote.seconds, 1),
        "gpu_hours": round(quote.gpu_hours, 3),
        "price_usd": round(quote.price, 2),
        "captions_per_gpu_hour": quote.captions_per_gpu_hour,
        "shards": len(found.shards),
        "unit_rows": plan.unit_rows,
        "fingerprint": plan.fingerprint,
        "text": quote.text(),  # for people
    }


def expected_pool(cfg: FuseConfig) -> tuple[float, int]:
    """GPUs an actor, and actors: what a run on this machine would take, where it can; else what is asked for.

    A cluster is not asked: one that scales up has few GPUs or none until a run wants them. Then it is a CPU's quote, and says so.
    """
    asked, elsewhere = cfg.cluster, cluster.named(cfg.cluster)
    if not elsewhere:
        here = cluster.this_machine()
        wanted = (asked.gpus_per_actor or 0.0) * asked.min_actors or float(cfg.engine.device == "cuda")
        if here.gpus >= wanted:  # else it is a cluster that is planned for here
            pool = cluster.resolve_pool(asked, cfg.engine, here, units=sys.maxsize)
            return pool.gpus_per_actor, pool.max_actors
    if asked.gpus_per_actor is not None:
        return asked.gpus_per_actor, asked.max_actors or asked.min_actors
    if elsewhere and cfg.engine.loads_model and cfg.engine.device == "auto":
        log.warning(
            "%s: what GPUs it has is not asked; this is the quote of a CPU, and cluster.gpus_per_actor=1 gives a GPU's",
            elsewhere,
        )
    gpus = float(cfg.engine.vllm.tensor_parallel) if cfg.engine.device == "cuda" else 0.0
    return gpus, asked.max_actors or asked.min_actors


def together_of(engine: EngineConfig, device: str) -> int:
    """Captions that one such engine writes at a time."""
    if engine.kind == "transformers":
        return engine.batch_size
    if engine.kind == "api":
        return engine.api.concurrency
    return engine.slots or GUESSED_SLOTS.get((engine.kind, device), 0)


def sample(cfg: FuseConfig, found: Survey) -> list[CaptionPair]:
    """Rows spread over all shards that have both captions."""
    table = sources.sample(found.shards, SAMPLE_ROWS, read_spec(cfg, found.fields))
    rows = zip(*(table[name].to_pylist() for name in (ROW_ID, RAW, SYNTHETIC)), strict=True)
    return [CaptionPair(row_id, raw, synthetic) for row_id, raw, synthetic in rows if raw and synthetic]


def expected_tokens(cfg: FuseConfig, found: Survey, pairs: list[CaptionPair]) -> tuple[float, float]:
    """Mean prompt tokens and expected output tokens a row, without any engine."""
    if not pairs:
        return 0.0, 0.0
    if not cfg.engine.loads_model:  # no tokenizer here: words
        words = sum(len(pair.raw.split()) + len(pair.synthetic.split()) for pair in pairs) / len(pairs)
        return words + len(found.model.template.split()), words
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        folder_of(cfg.engine, weights=False), trust_remote_code=cfg.engine.trust_remote_code
    )
    builder = PromptBuilder(
        found.model.template, lambda texts: tokenizer(list(texts))["input_ids"], cfg.engine.max_prompt_tokens
    )
    prompts = [p for p in builder.build(pairs) if not isinstance(p, Exception)]
    suffix = sum(len(p.suffix_ids) for p in prompts) / max(len(prompts), 1)
    return len(builder.prefix_ids) + suffix, min(suffix * OUTPUT_PER_SUFFIX_TOKEN, float(cfg.decode.max_new_tokens))
