"""A whole finished run with the echo engine: shards, plan, actor, commits, compaction, manifest. Without Ray."""

from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
from outputs import DiesAt

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
from capsfusion_ray.run.pipeline import Pool
from capsfusion_ray.run.poison_rows import AttemptLog
from capsfusion_ray.storage import Store

LEASE = SimpleNamespace(check=lambda: None)
POOL = Pool(1, 1, 1.0, 0.0, 1)


def config(path, *more):
    return parse_config(
        FuseConfig,
        [
            f"input.path={path / 'in'}",
            f"output.path={path / 'out'}",
            "engine.kind=echo",
            "source.passthrough=[lang]",
            "output.target_file_rows=10",
            *more,
        ],
    )


STRICT = ("gates.cut_off={action: reject, threshold: 1, flag_from: null}",)


def actor_of(cfg, store):
    return FusionActor(cfg.engine, cfg.decode, TEMPLATE, AttemptLog(store, "run"))


def finished(path, partition_by="shard", *more):
    """24 rows in two shards; every other one is rejected as cut off, and one caption is null."""
    (path / "in").mkdir(parents=True)
    for shard in "ab":
        rows = [
            {
                "url": f"https://example.com/{shard}{i}.jpg",
                # The echo engine writes both sources, up to its limit of 80 words, and draws no fault for these.
                "raw": None if i == 5 else f"Cape {shard.upper()} No. {i}" + " long" * 90 * (i % 2),
                "synthetic": "A tall lighthouse stands at the harbour.",
                "lang": "en" if i % 3 else None,
                "punsafe": None if i == 2 else i / 10,
            }
            for i in range(12)
        ]
        pq.write_table(pa.Table.from_pylist(rows), path / "in" / f"{shard}.parquet")
    return fuse_here(config(path, *STRICT, f"output.partition_by={partition_by}", *more), 6)


def fuse_here(cfg, unit_rows):
    """What jobs/fuse.py leaves, in this process and one unit after the other; its manifest."""
    shards = sources.discover(cfg.input, cfg.source)
    schema = sources.frozen_schema(shards, cfg.source, cfg.filter)
    fields = tuple((f.name, str(f.type)) for f in schema if f.name not in {p.name for p in PAIR_FIELDS})
    base = {f"output.{key}": getattr(cfg.output, key) for key in ("target_file_mb", "target_file_rows", "partition_by")}
    plan = make_plan(shards, base, unit_rows, fields)
    store = Store(cfg.output.path)
    write_plan(store, plan)
    actor = actor_of(cfg, store)
    for unit in plan.units:
        shard = next(shard for shard in shards if shard.path == unit.path)
        read = sources.read_rows(shard, unit.start, unit.stop, sources.ReadSpec(schema, cfg.source, cfg.filter))
        filtered = {str(reason): rows for reason, rows in read.filtered.items()}
        batch = actor(UnitBatch(unit, admit(read.table, cfg.gates), Apart(filtered)).pack())
        commit(store, *judge_unit(UnitBatch.unpack(batch), fields, cfg.gates))
    groups = sorted({unit.group for unit in plan.units})
    entries = [compact_group(store, g, 1, [u for u in plan.units if u.group == g], fields, cfg.output) for g in groups]
    manifest = assemble([plan], entries, [{"revision": 1, "kind": "base"}])
    store.put(MANIFEST, manifest.to_bytes())
    return manifest


def rows_of(path, folder):
    files = (path / "out" / folder).rglob("*.parquet")
    return {row["row_id"]: row for file in files for row in pq.read_table(file, partitioning=None).to_pylist()}


def killed_at_every_write(folder, revise, want, prepare=lambda path: None):
    """Kill `revise(output folder, store)` at each of its writes, repeat it, and expect the rows `want`."""
    kills = 0
    for at in range(1, 60):
        path = folder / f"killed{at}"
        finished(path)
        prepare(path)
        store = Store(str(path / "out"))
        try:
            revise(path, DiesAt(store, at))
        except KeyboardInterrupt:
            kills += 1
        else:
            break
        revise(path, store)
        verify(VerifyConfig(config(path).output, deep=True))
        assert rows_of(path, "data") == want
    else:
        raise AssertionError("it never came to its end")
    assert kills >= 6
