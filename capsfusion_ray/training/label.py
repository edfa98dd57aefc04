"""Label captions with a teacher model: the fuse job with an API engine, strict gates, small units and a limit of cost.

The limit holds for all runs of an output together. This module has only the defaults and the accounting of the cost; the
fuse job does the rest. Knows no Ray.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from capsfusion_ray.config import (
    ApiConfig,
    ClusterConfig,
    DecodeConfig,
    EngineConfig,
    FuseConfig,
    GateConfig,
    GatesConfig,
    UnitConfig,
    section,
)
from capsfusion_ray.core.prompt import TEMPLATE
from capsfusion_ray.dataset.layout import RETRY_DIR
from capsfusion_ray.dataset.manifest import read_groups
from capsfusion_ray.dataset.plan_files import read_plans
from capsfusion_ray.dataset.unit_files import committed, parts_of, read_summaries
from capsfusion_ray.engines.api.engine import check
from capsfusion_ray.errors import ConfigError, CostCapReached
from capsfusion_ray.storage import Store

# Without the last line a chat model tends to introduce what it writes.
TEACHER_PROMPT = TEMPLATE.removesuffix("New Sentence:") + "\nAnswer with the new sentence alone."


def _strict() -> GatesConfig:
    """As conf/gates/strict.yaml. No gate keeps a source as the caption, because a student would learn to copy it."""
    reject = GateConfig("reject", 1)
    return GatesConfig(
        boilerplate="reject",
        instruction_echo=reject,
        cut_off=reject,
        unsupported_name=reject,
        too_short=GateConfig("reject", 3),
        repeated_caption=GateConfig("reject", 0.001),  # a teacher that refuses many pairs repeats one sentence
    )


@dataclass(frozen=True)
class LabelConfig(FuseConfig):
    """capsfusion label: the settings of `capsfusion fuse` with other defaults. engine.api.max_dollars limits all runs together."""

    # A stopped run loses what it paid for units that were not committed: at most units_in_flight units per actor.
    unit: UnitConfig = section(lambda: UnitConfig(rows=100))
    engine: EngineConfig = section(lambda: EngineConfig(kind="api", api=ApiConfig(prompt=TEACHER_PROMPT)))
    decode: DecodeConfig = section(lambda: DecodeConfig(num_beams=1, max_new_tokens=200))
    gates: GatesConfig = section(_strict)
    cluster: ClusterConfig = section(lambda: ClusterConfig(max_actors=1, gpus_per_actor=0.0))


def prepare(cfg: LabelConfig) -> LabelConfig:
    """Return the config to fuse with, in which engine.api.max_dollars is the limit of one actor.

    The committed units of the output have used a part of the limit; the rest is divided among the actors. Raises
    ConfigError for a missing URL, model or key, and CostCapReached if the committed units have used the whole limit.
    """
    if cfg.engine.kind != "api":
        raise ConfigError(
            f"engine.kind={cfg.engine.kind}: `capsfusion label` needs engine.kind=api; use `capsfusion fuse` for other engines"
        )
    check(cfg.engine.api, cfg.decode)
    cap = cfg.engine.api.max_dollars
    if cap is None:
        return cfg
    if cfg.cluster.max_actors is None:
        raise ConfigError(
            "cluster.max_actors=null: engine.api.max_dollars is divided among the actors, so give a number of actors"
        )
    spent = dollars_spent(Store(cfg.output.path, cfg.output.storage), cfg.engine.api)
    if spent >= cap:
        raise CostCapReached(
            f"engine.api.max_dollars={cap:g}: the committed units of {cfg.output.path} cost {spent:.4f} dollars; give the same "
            "command with a higher limit to resume"
        )
    api = dataclasses.replace(cfg.engine.api, max_dollars=(cap - spent) / cfg.cluster.max_actors)
    return dataclasses.replace(cfg, engine=dataclasses.replace(cfg.engine, api=api))


def dollars_spent(store: Store, api: ApiConfig) -> float:
    """Return what the committed units cost at the configured prices. Failed requests and unfinished units are not counted."""
    entries = read_groups(store)
    summaries = [unit for entry in entries for unit in entry.units]
    waiting = committed(store) - {unit.id for unit in summaries}
    planned = [unit for plan in read_plans(store) for unit in plan.units]
    summaries += read_summaries(store, [unit for unit in planned if unit.id in waiting])
    for edition in sorted(
        {file.path.split("/")[1] for file in store.list(RETRY_DIR)}
    ):  # of a retry that is not merged yet
        retried = parts_of(store, int(edition.removeprefix("e")))
        done = committed(retried)
        summaries += read_summaries(retried, [unit for unit in planned if unit.id in done])
    return sum(api.dollars(unit.prompt_tokens, unit.output_tokens) for unit in summaries)


def train_command(cfg: FuseConfig) -> str:
    """Return the command that trains a model on the labels."""
    where = (
        f"<a copy of {cfg.output.path} here>" if "://" in cfg.output.path else cfg.output.path
    )  # training reads a local folder
    return (
        f"capsfusion train conf/train/finetune.yaml model.path=<hub id or folder> data.path={where} data.fused=capsfusion "
        "output.path=<model folder>"
    )
