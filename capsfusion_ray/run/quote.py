"""Estimate what a fuse run would do, take and cost, from the listing, the footers and a sample. Writes nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

from capsfusion_ray import sources
from capsfusion_ray.config import EngineConfig, FuseConfig, PlanConfig
from capsfusion_ray.core.columns import RAW, ROW_ID, SYNTHETIC
from capsfusion_ray.core.cost_model import GUESSED_SLOTS, Estimate
from capsfusion_ray.core.plan import Plan
from capsfusion_ray.core.prompt import PromptBuilder
from capsfusion_ray.core.types import CaptionPair
from capsfusion_ray.dataset.manifest import read_groups
from capsfusion_ray.dataset.plan_files import read_plans
from capsfusion_ray.dataset.unit_files import committed
from capsfusion_ray.errors import SourceError
from capsfusion_ray.models.cache import folder_of
from capsfusion_ray.models.inspect import resolve_with_model
from capsfusion_ray.run.calibrate import Device, calibrate
from capsfusion_ray.run.executors.base import executor_class
from capsfusion_ray.run.survey import OutputState, Survey, next_plan, read_spec, speed, survey
from capsfusion_ray.storage import Store

SAMPLE_ROWS = 400  # of the input, to count tokens and to calibrate
OUTPUT_PER_SUFFIX_TOKEN = 36 / 46  # mean fused tokens over mean caption tokens of a prompt, published examples (SPEC)


@dataclasses.dataclass(frozen=True)
class _ActorSpeed:
    """What one actor is expected to do, and where that is known from."""

    captions_per_s: float
    source: str
    tokens: tuple[float, float]  # mean per row: of the prompt, of the output
    captions_in_flight: int  # captions that the engine writes at the same time
    device: Device
    gpus: float  # per actor


def estimate(cfg: PlanConfig) -> dict[str, Any]:
    """The plan that a fuse run would make now, its price, and `text` for people. Raises what the survey of a fuse run raises."""
    found = survey(cfg)
    gpus, actors = expected_pool(cfg)
    engine, decode = resolve_with_model(cfg.engine, cfg.decode, found.model)
    cfg = dataclasses.replace(cfg, engine=engine, decode=decode)
    actor = _measured(cfg, found, gpus) if cfg.calibrate else _guessed(cfg, found, gpus)
    dtype = engine.dtype if engine.dtype != "auto" else ("bfloat16" if actor.device == "cuda" else "float32")
    cfg = dataclasses.replace(cfg, engine=dataclasses.replace(engine, device=actor.device, dtype=dtype))
    store = Store(cfg.output.path, cfg.output.storage)
    before = read_plans(store)
    plan = next_plan(cfg, found, actor.device, before)
    begun = OutputState(store, before, read_groups(store), committed(store)) if before else OutputState(store, [], [])
    quote = _quote(cfg, found, actor, actors, begun, plan)
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


def _quote(cfg: PlanConfig, found: Survey, actor: _ActorSpeed, actors: int, begun: OutputState, plan: Plan) -> Estimate:
    left = [*begun.pending, *plan.units]
    rows = sum(unit.rows for unit in left)
    return Estimate(
        rows=rows,
        units=len(left),
        actors=max(min(actors, len(left)), 1),
        captions_per_s=actor.captions_per_s,
        prompt_tokens=actor.tokens[0],
        output_tokens=actor.tokens[1],
        gpus_per_actor=actor.gpus,
        price_per_gpu_hour=cfg.cluster.price_per_gpu_hour,
        speed_source=actor.source,
        errors={shard.path: shard.error for shard in found.shards if shard.error},
        rows_done=begun.planned_rows + plan.rows - rows,
        preempted_every_h=cfg.preempted_every_h,
        restart_s=cfg.restart_s,
        captions_in_flight=actor.captions_in_flight,
    )


def _measured(cfg: PlanConfig, found: Survey, gpus: float) -> _ActorSpeed:
    """By running one engine over a sample. Raises SourceError where no row of it has both captions."""
    if not (pairs := sample(cfg, found)):
        raise SourceError(
            f"input.path={cfg.input.path}: no row of the sample has both captions; nothing to calibrate with"
        )
    measured = calibrate(cfg, found.model.template, pairs)
    return _ActorSpeed(
        measured.captions_per_s,
        f"measured: {measured.captions} captions by one actor here",
        (measured.prompt_tokens, measured.output_tokens),
        measured.captions_in_flight,
        measured.device,
        (gpus or 1.0) if measured.device == "cuda" else 0.0,
    )


def _guessed(cfg: PlanConfig, found: Survey, gpus: float) -> _ActorSpeed:
    """From unit.captions_per_s, else from the table of core/cost_model."""
    device: Device = "cuda" if gpus else "cpu"
    source = "unit.captions_per_s" if cfg.unit.captions_per_s else f"guess for {cfg.engine.kind} on {device}"
    tokens = expected_tokens(cfg, found, sample(cfg, found))
    return _ActorSpeed(speed(cfg, device), source, tokens, captions_in_flight(cfg.engine, device), device, gpus)


def expected_pool(cfg: FuseConfig) -> tuple[float, int]:
    """GPUs per actor, and actors, that the executor of cluster.kind expects a run to take."""
    return executor_class(cfg.cluster).expected_pool(cfg.cluster, cfg.engine)


def captions_in_flight(engine: EngineConfig, device: str) -> int:
    """Captions that one such engine writes at the same time."""
    if engine.kind == "transformers":
        return engine.batch_size
    if engine.kind == "api":
        return engine.api.concurrency
    return engine.slots or GUESSED_SLOTS.get((engine.kind, device), 0)


def sample(cfg: FuseConfig, found: Survey) -> list[CaptionPair]:
    """SAMPLE_ROWS rows spread over all shards; of these the ones that have both captions."""
    table = sources.sample(found.shards, SAMPLE_ROWS, read_spec(cfg, found.fields))
    rows = zip(*(table[name].to_pylist() for name in (ROW_ID, RAW, SYNTHETIC)), strict=True)
    return [CaptionPair(row_id, raw, synthetic) for row_id, raw, synthetic in rows if raw and synthetic]


def expected_tokens(cfg: FuseConfig, found: Survey, pairs: list[CaptionPair]) -> tuple[float, float]:
    """Mean prompt tokens and expected output tokens per row, without any engine."""
    if not pairs:
        return 0.0, 0.0
    if not cfg.engine.loads_model:  # it has no tokenizer: count words
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
