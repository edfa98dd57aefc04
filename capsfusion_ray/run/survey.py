"""What a fuse run knows before it touches a cluster: the model, the shards, the columns, the plan, and what is left to do.

Knows no Ray and writes nothing. The plan job ends here; the fuse job continues in driver.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from capsfusion_ray import sources
from capsfusion_ray.config import FuseConfig, as_dict
from capsfusion_ray.core.columns import PAIR_FIELDS, extra_fields, name_of_type
from capsfusion_ray.core.cost_model import GUESSED_CAPTIONS_PER_S
from capsfusion_ray.core.plan import Plan, make_plan
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.dataset.manifest import GroupEntry
from capsfusion_ray.errors import ConfigError, SourceError
from capsfusion_ray.models.inspect import ModelInfo, inspect_model
from capsfusion_ray.sources import ReadSpec, Shard
from capsfusion_ray.storage import Store

log = logging.getLogger(__name__)
DEMO_MODEL_ROWS = 100_000  # the largest run that the embedded demo model may do unasked
# An actor holds all rows of a unit in memory, at about 5 kB per row. Only engine.kind=echo is fast enough to reach this.
MAX_UNIT_ROWS = 50_000


@dataclass(frozen=True)
class Survey:
    """The model, the shards, and the name and type of each column that is carried along."""

    model: ModelInfo
    shards: tuple[Shard, ...]
    fields: tuple[tuple[str, str], ...]


def survey(cfg: FuseConfig) -> Survey:
    """Inspect the model and list the input, so that an error that needs no cluster is raised within seconds.

    Raises ConfigError for settings that cannot work, and SourceError for an input without a readable shard.
    """
    if cfg.engine.kind == "api":
        from capsfusion_ray.engines.api.engine import check

        check(cfg.engine.api, cfg.decode)
    sources.refuse_output_in_input(cfg.input.paths, "input.path", cfg.output.path)
    model = inspect_model(cfg.engine)
    shards = _readable_shards(cfg)
    schema = sources.frozen_schema(shards, cfg.source, cfg.filter)
    pair_columns = {field.name for field in PAIR_FIELDS}
    fields = tuple((field.name, name_of_type(field.type)) for field in schema if field.name not in pair_columns)
    _check_partition(cfg.output.partition_by, {name: schema.field(name).type for name, _ in fields})
    return Survey(model, shards, fields)


def _readable_shards(cfg: FuseConfig) -> tuple[Shard, ...]:
    """All shards of the input; those that cannot be read carry their error. Raises SourceError where none can be read."""
    shards = sources.without_foreign(sources.discover(cfg.input, cfg.source), cfg.source, cfg.filter)
    for shard in shards:
        if shard.error:
            log.warning("unreadable shard %s: %s; its rows are missing from this run", shard.path, shard.error)
    if all(shard.error for shard in shards):
        found = "; ".join(f"{shard.path}: {shard.error}" for shard in shards[:3]) or "no files"
        raise SourceError(f"input.path={cfg.input.path}: nothing readable ({found})")
    return tuple(shards)


def _check_partition(by: str, extra: dict[str, pa.DataType]) -> None:
    """Check that column `by` can name the folders of the output. `extra`: the types of the columns carried along.

    Raises ConfigError.
    """
    if by == "shard" and "shard" in extra:
        raise ConfigError(
            "source.passthrough: the output's folders are called shard=…, and a reader would find two columns of that name; rename it in the "
            "input, leave it out, or partition the output by another column (output.partition_by)"
        )
    if by != "shard" and by not in extra:
        raise ConfigError(f"output.partition_by={by}: not a passthrough column; have {list(extra)} or shard")
    if by != "shard" and pa.types.is_nested(extra[by]):
        raise ConfigError(
            f"output.partition_by={by}: a column of {extra[by]}, which makes no folder's name; partition by another"
        )


def read_spec(cfg: FuseConfig, fields: Sequence[tuple[str, str]]) -> ReadSpec:
    """How every shard is read: the columns of the pair, then the columns carried along (`fields`)."""
    return ReadSpec(pa.schema([*PAIR_FIELDS, *extra_fields(fields)]), cfg.source, cfg.filter, cfg.input.storage)


def base_of(cfg: FuseConfig, model: ModelInfo) -> dict[str, Any]:
    """Everything that decides the output, by the key that a user would change. `cfg`'s engine and decode must be resolved."""
    plain = as_dict(cfg)
    base: dict[str, Any] = {"prompt": model.template, "engine.model": model.content}
    keep = {
        "source": plain["source"],
        "filter": plain["filter"],
        "gates": plain["gates"],
        "decode": plain["decode"],
        "engine": {key: plain["engine"][key] for key in ("kind", "dtype", "max_prompt_tokens")},
        "output": {key: plain["output"][key] for key in ("target_file_mb", "target_file_rows", "partition_by")},
    }
    if cfg.engine.kind == "api":
        keep["engine.api"] = {key: plain["engine"]["api"][key] for key in ("model", "chat", "temperature", "request")}
    if cfg.engine.kind == "vllm":
        keep["engine.vllm"] = {key: plain["engine"]["vllm"][key] for key in ("temperature", "sampling", "options")}
    for section, values in keep.items():
        base |= {f"{section}.{key}": value for key, value in values.items()}
    return base


def unit_rows(cfg: FuseConfig, device: str, before: Sequence[Plan]) -> int:
    """Rows per unit: unit.rows, else those of the output's first plan, else unit.target_s times the speed of one actor."""
    if cfg.unit.rows:
        return cfg.unit.rows
    if before:
        return before[0].unit_rows
    return min(max(int(cfg.unit.target_s * speed(cfg, device)), 1), MAX_UNIT_ROWS)


def speed(cfg: FuseConfig, device: str) -> float:
    """Captions per second of one actor: unit.captions_per_s, else the guess for this engine and device."""
    return cfg.unit.captions_per_s or GUESSED_CAPTIONS_PER_S[cfg.engine.kind, device]


def next_plan(cfg: FuseConfig, found: Survey, device: str, before: Sequence[Plan]) -> Plan:
    """The plan of the rows that the plans in `before` do not hold; a plan without units where they hold all rows.

    Raises SourceError where a column that the output carries is gone from the input, and ConfigError where the settings
    are not those of the output, or where the embedded demo model is given more rows than it may do.
    """
    rows = unit_rows(cfg, device, before)
    base = base_of(cfg, found.model) | {"unit.rows": rows}
    fields = before[0].fields if before else found.fields
    missing = [name for name, _ in fields if name not in dict(found.fields)]
    if missing:
        raise SourceError(
            f"input.path={cfg.input.path}: the columns {missing} were in the input when this output was begun, and no shard "
            "has them now; restore them, or choose a new output.path"
        )
    plan = make_plan(found.shards, base, rows, fields, cfg.input.limit, cfg.output.max_shard_groups, before)
    _refuse_large_demo(cfg, found.model, plan.rows + sum(earlier.rows for earlier in before))
    return plan


def _refuse_large_demo(cfg: FuseConfig, model: ModelInfo, rows: int) -> None:
    demo = model.embedded and cfg.engine.kind != "echo" and not cfg.engine.allow_demo_model
    if demo and rows > DEMO_MODEL_ROWS:
        raise ConfigError(
            f"{rows:,} rows with the embedded demo model, which is made for demos and tests (limit {DEMO_MODEL_ROWS:,}); give "
            "engine.model=<your model>, or input.limit=…, or engine.allow_demo_model=true"
        )


@dataclass
class OutputState:
    """What is planned for one output, what of it is done, and what is left."""

    store: Store
    plans: list[Plan]
    entries: list[GroupEntry]
    in_parts: set[str] = field(default_factory=set)  # ids of the units that have a part

    @property
    def units(self) -> list[WorkUnit]:
        return [unit for plan in self.plans for unit in plan.units]

    @property
    def compacted(self) -> set[str]:
        """Ids of the units whose group is compacted."""
        return {unit.id for entry in self.entries for unit in entry.units}

    @property
    def pending(self) -> list[WorkUnit]:
        """The units that are neither compacted nor in parts."""
        done = self.compacted | self.in_parts
        return [unit for unit in self.units if unit.id not in done]

    @property
    def planned_rows(self) -> int:
        return sum(plan.rows for plan in self.plans)
