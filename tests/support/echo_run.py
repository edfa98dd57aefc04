"""A whole finished run with the echo engine, in this process: the local executor runs what a cluster would."""

import dataclasses
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
from outputs import DiesAt

from capsfusion_ray.config import ClusterConfig, FuseConfig, VerifyConfig, parse_config
from capsfusion_ray.dataset.manifest import read_manifest
from capsfusion_ray.dataset.verify import verify
from capsfusion_ray.run.driver import fuse
from capsfusion_ray.run.executors.local import LocalExecutor
from capsfusion_ray.run.pool import Pool
from capsfusion_ray.storage import Store

LEASE = SimpleNamespace(check=lambda: None)
# One unit in flight: the order of the writes is the same in each run, for those who count them.
POOL = Pool(1, 1, 1.0, 0.0, 1)
LOCAL = ClusterConfig(kind="local", units_in_flight=1)


def config(path, *more):
    return parse_config(
        FuseConfig,
        [
            f"input.path={path / 'in'}",
            f"output.path={path / 'out'}",
            "engine.kind=echo",
            "source.passthrough=[lang]",
            "output.target_file_rows=10",
            "cluster.kind=local",
            *more,
        ],
    )


STRICT = ("gates.cut_off={action: reject, threshold: 1, flag_from: null}",)


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
    """What `capsfusion fuse` leaves, done in this process; its manifest."""
    fuse(dataclasses.replace(cfg, unit=dataclasses.replace(cfg.unit, rows=unit_rows), cluster=LOCAL))
    return read_manifest(Store(cfg.output.path))


def local():
    """An executor for one run of an edit."""
    return LocalExecutor(LOCAL)


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
