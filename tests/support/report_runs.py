"""Outputs to report on: some units stand in data/, the others are parts on their way; some rows are rejected or flagged."""

import pyarrow as pa

from capsfusion_ray.config import OutputConfig
from capsfusion_ray.core.accounting import summarise
from capsfusion_ray.core.columns import part_schema
from capsfusion_ray.core.plan import Plan, PlannedShard
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.core.unit_batch import UnitBatch
from capsfusion_ray.dataset.compaction import compact_group
from capsfusion_ray.dataset.layout import MANIFEST
from capsfusion_ray.dataset.manifest import assemble
from capsfusion_ray.dataset.plan_files import write_plan
from capsfusion_ray.dataset.unit_files import commit
from capsfusion_ray.reports.job import ReportConfig
from capsfusion_ray.storage import Store

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> & Nürnberg 2019 \u2028 東京"
PER_REASON = 3


def unit(i, rows):
    return WorkUnit(f"u{i}", f"s{i}.parquet", 0, rows, f"g{i:05d}")


def part(of):
    rows = []
    for i in range(of.start, of.stop):
        rejected, flagged = i % 10 == 0, i % 10 == 1
        rows.append(
            {
                "image_url": "https://example.com/1.jpg",
                "laion_2b": HOSTILE,
                "laion_coco": "A stall at night.",
                "capsfusion": f"A stall at night in Nürnberg in 2019, {HOSTILE}",
                "row_id": f"{of.path}:{i}",
                "flags": ["lost_entity"] if flagged else [],
                "outcome": "rejected" if rejected else "fused",
                "reason": "repetition" if rejected else None,
                "detail": "'a a a'" if rejected else "",
                "prompt_tokens": 9,
                "output_tokens": 4,
            }
        )
    return pa.Table.from_pylist(rows, schema=part_schema(()))


def run_of(path, units, compacted):
    """An output of which `compacted` units stand in data/ and the others are parts on their way."""
    store, output = Store(str(path)), OutputConfig(str(path))
    plan = Plan(
        1, {"decode.num_beams": 3}, 10, (), tuple(units), tuple(PlannedShard(u.path, "c", 99, u.group) for u in units)
    )
    write_plan(store, plan)
    for each in units:
        table = part(each)
        commit(store, table, summarise(UnitBatch(each, table), table))
    entries = [compact_group(store, each.group, 1, [each], (), output) for each in units[:compacted]]
    if compacted == len(units):
        store.put(MANIFEST, assemble([plan], entries, [{"revision": 1}]).to_bytes())
    return ReportConfig(output, rows_per_reason=PER_REASON)
