"""Every stage between shard and dataset, in this process: what the Ray graph strings together, without Ray."""

from pathlib import Path

from capsfusion_ray import sources
from capsfusion_ray.config import FuseConfig, VerifyConfig, parse_config
from capsfusion_ray.core.columns import PAIR_FIELDS
from capsfusion_ray.core.plan import make_plan
from capsfusion_ray.core.prompt import TEMPLATE
from capsfusion_ray.core.unit_batch import Apart, UnitBatch
from capsfusion_ray.core.unit_steps import admit, judge_unit
from capsfusion_ray.dataset.compaction import compact_group
from capsfusion_ray.dataset.layout import MANIFEST
from capsfusion_ray.dataset.manifest import assemble
from capsfusion_ray.dataset.plan_files import write_plan
from capsfusion_ray.dataset.unit_files import commit
from capsfusion_ray.dataset.verify import verify
from capsfusion_ray.run.actor import FusionActor
from capsfusion_ray.run.poison_rows import AttemptLog
from capsfusion_ray.storage import Store

ROOT = Path(__file__).resolve().parents[2]


def test_the_demo_captions_pass_through_every_stage_and_the_accounting_closes(tmp_path):
    cfg = parse_config(
        FuseConfig,
        [f"input.path={ROOT / 'examples/captions'}", "source.passthrough=[WIDTH]", f"output.path={tmp_path}"],
    )
    shards = sources.discover(cfg.input, cfg.source)
    assert [shard.path for shard in shards if shard.error] == ["part-00003.parquet"]
    schema = sources.frozen_schema(shards, cfg.source, cfg.filter)
    names = {field.name for field in PAIR_FIELDS}
    fields = tuple((field.name, str(field.type)) for field in schema if field.name not in names)
    spec = sources.ReadSpec(schema, cfg.source, cfg.filter)
    plan = make_plan(shards, {}, 40, fields)
    store = Store(str(tmp_path))
    write_plan(store, plan)
    actor = FusionActor(
        parse_config(FuseConfig, ["engine.kind=echo"]).engine, cfg.decode, TEMPLATE, AttemptLog(store, "run")
    )
    for unit in plan.units:
        shard = next(shard for shard in shards if shard.path == unit.path)
        read = sources.read_rows(shard, unit.start, unit.stop, spec)
        assert not read.unreadable
        batch = UnitBatch(unit, admit(read.table, cfg.gates), Apart()).pack()
        part, summary = judge_unit(UnitBatch.unpack(actor(batch)), fields, cfg.gates)
        assert commit(store, part, summary)
    groups = sorted({unit.group for unit in plan.units})
    entries = [compact_group(store, g, 1, [u for u in plan.units if u.group == g], fields, cfg.output) for g in groups]
    manifest = assemble([plan], entries, [{"revision": 1}])
    store.put(MANIFEST, manifest.to_bytes())
    assert verify(VerifyConfig(cfg.output, deep=True))["rows"]["planned"] == plan.rows == 325
    for reason in ("null_caption", "empty_caption", "invalid_utf8", "unparsable"):
        assert manifest.counts.reasons.get(reason), f"the demo's {reason} rows must be rejected by that name"
