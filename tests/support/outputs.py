"""Small finished outputs, written without an engine; the files of an output, for comparisons; a store whose user is killed."""

from pathlib import Path

import pyarrow as pa

from capsfusion_ray.core.accounting import summarise
from capsfusion_ray.core.columns import part_schema
from capsfusion_ray.core.plan import Plan, PlannedShard
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.core.unit_batch import Apart, UnitBatch
from capsfusion_ray.dataset.compaction import compact_group
from capsfusion_ray.dataset.layout import MANIFEST
from capsfusion_ray.dataset.manifest import assemble
from capsfusion_ray.dataset.plan_files import write_plan
from capsfusion_ray.dataset.unit_files import commit, committed

FIELDS = (("lang", "string"),)
OUTCOMES = ("fused", "kept", "rejected")


def part_of(unit, outcomes):
    rows = [
        {
            "image_url": f"u{i}",
            "laion_2b": "raw",
            "laion_coco": "synthetic",
            "capsfusion": f"caption {i}",
            "row_id": f"{unit.path}:{unit.start + i}",
            "flags": ["kept", "cut_off"] if outcome == "kept" else [],
            "lang": "en" if i % 2 else None,
            "outcome": outcome,
            "reason": None if outcome == "fused" else "cut_off",
            "detail": "",
            "prompt_tokens": 9,
            "output_tokens": 4,
        }
        for i, outcome in enumerate(outcomes)
    ]
    return pa.Table.from_pylist(rows, schema=part_schema(FIELDS))


def run_of(store, units, outcomes, output, filtered=0):
    """Commit and compact `units`, each with rows of `outcomes` and `filtered` rows that are left out; the published manifest."""
    groups = sorted({unit.group for unit in units})
    base = {f"output.{key}": getattr(output, key) for key in ("target_file_mb", "target_file_rows", "partition_by")}
    plan = Plan(
        1, {"k": "v"} | base, 10, FIELDS, tuple(units), tuple(PlannedShard(u.path, "c", 99, u.group) for u in units)
    )
    write_plan(store, plan)
    for unit in units:
        table = part_of(unit, outcomes)
        batch = UnitBatch(unit, table, Apart({"punsafe": filtered} if filtered else {}))
        assert commit(store, table, summarise(batch, table))
    assert committed(store) == {unit.id for unit in units}
    entries = [compact_group(store, g, 1, [u for u in units if u.group == g], FIELDS, output) for g in groups]
    manifest = assemble([plan], entries, [{"revision": 1}])
    store.put(MANIFEST, manifest.to_bytes())
    return manifest


def units_of(count, rows, groups=2):
    return [
        WorkUnit(f"u{i}", f"s{i % groups}.parquet", i * rows, (i + 1) * rows, f"g{i % groups:05d}")
        for i in range(count)
    ]


def snapshot(output):
    """Path -> bytes, of every data file of an output in a local folder."""
    files = [path for folder in ("data", "rejected") for path in (output / folder).rglob("*.parquet")]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


class DiesAt:
    """A store whose `at`-th write or deletion raises KeyboardInterrupt, as a kill would; a deletion deletes half of its files before."""

    def __init__(self, store, at):
        self._store, self._left = store, at

    def __getattr__(self, name):
        method = getattr(self._store, name)
        return self._counted(method) if name in ("put", "put_if_absent", "put_if_match", "delete") else method

    def _counted(self, method):
        def call(*args):
            self._left -= 1
            if self._left == 0:
                if method.__name__ == "delete":
                    paths = list(args[0])
                    method(paths[: len(paths) // 2])
                raise KeyboardInterrupt
            return method(*args)

        return call


def flip_a_bit(folder: Path) -> Path:
    """Change one bit in the middle of the first Parquet file below `folder`, as a bad disk does; the path of that file."""
    path = min(folder.rglob("*.parquet"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path
