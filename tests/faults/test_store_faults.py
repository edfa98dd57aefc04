"""Random faults between client and server: every operation of a store keeps its promise, and so does a whole run."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto_server import PAGE_KEYS
from proxy import KINDS, FaultProxy, Faults

from capsfusion_ray import sources
from capsfusion_ray.cli import EXIT_DONE, run_job
from capsfusion_ray.config import FuseConfig, InputConfig, VerifyConfig, parse_config
from capsfusion_ray.core.columns import PAIR_FIELDS
from capsfusion_ray.core.plan import make_plan
from capsfusion_ray.core.prompt import TEMPLATE
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.core.unit_batch import Apart, UnitBatch
from capsfusion_ray.core.unit_steps import admit, judge_unit
from capsfusion_ray.dataset.compaction import compact_group
from capsfusion_ray.dataset.layout import MANIFEST
from capsfusion_ray.dataset.lease import Lease
from capsfusion_ray.dataset.manifest import Manifest, assemble, read_groups
from capsfusion_ray.dataset.plan_files import read_plans, write_plan
from capsfusion_ray.dataset.unit_files import commit, committed, read_summaries
from capsfusion_ray.dataset.verify import verify
from capsfusion_ray.errors import StorageError
from capsfusion_ray.run.poison_rows import AttemptLog, PoisonRowSearch
from capsfusion_ray.run.unit_fuser import UnitFuser, start_loop
from capsfusion_ray.storage import Store, client_faults, s3

THREADS = 8
OBJECTS = 8
LARGE = 6 << 20  # bytes; from 5 MiB on many clients would use a multipart upload


def all_of(work: Callable[[int], object], count: int) -> list[object]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, range(count)))


# ------------------------------------------------------------------------------------------------ single operations


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_every_operation_keeps_its_promise(proxy: FaultProxy, store: Store, calm: Store, share: float) -> None:
    proxy.inject(Faults(share, list_share=2 * share))

    def live(i: int) -> None:
        path, mine, other = f"u/{i:03d}", b"mine %d" % i * 500, b"other %d" % i * 500
        assert store.put_if_absent(path, mine), "there is no other writer, so a repeated PUT must count as ours"
        assert not store.put_if_absent(path, other), "the first writer's bytes are kept"
        data, etag = store.get_with_etag(path) or (b"", "")
        assert data == mine
        new = store.put_if_match(path, mine[::-1], etag)
        assert new, "the etag was right, so the swap must succeed"
        assert store.put_if_match(path, other, etag) is None
        with store.open_input(path) as file:
            file.seek(3)
            assert file.read(100) == mine[::-1][3:103]
        assert store.exists(path)
        assert store.get_with_etag(f"{path}-absent") is None

    all_of(live, OBJECTS)
    store.put("large", b"\x00\xff" * (LARGE // 2))
    assert store.get("large") == b"\x00\xff" * (LARGE // 2)
    assert {f.path: f.size for f in store.list("u")} == {
        f"u/{i:03d}": len(b"mine %d" % i * 500) for i in range(OBJECTS)
    }
    store.delete([f"u/{i:03d}" for i in range(OBJECTS)])
    assert [f.path for f in calm.list()] == ["large"]
    assert proxy.injected > proxy.count() * share / 2, "the proxy injected the faults"
    assert all(
        proxy.count(operation=name) for name in ("PutObject", "GetObject", "HeadObject", "ListObjects", "DeleteObject")
    )


@pytest.mark.parametrize(
    ("kind", "fewest", "causes"),
    [("slow_down", 2, {"503"}), ("reset_before", 1, {"ConnectionClosedError", "EndpointConnectionError"})],
)
def test_failed_requests_are_counted_by_cause(
    proxy: FaultProxy, store: Store, kind: str, fewest: int, causes: set[str]
) -> None:
    """aiohttp itself repeats a request once after the reset of a connection that was used before; it is not counted."""
    store.put("first", b"x")
    client_faults()
    proxy.inject(Faults(1.0, (kind,), frozenset(("PutObject",)), at_most=2))
    store.put("a", b"x")
    counted = client_faults()
    assert fewest <= counted.total() <= 2
    assert set(counted) <= causes
    assert store.exists("a")
    assert not store.exists("missing")
    assert not store.put_if_absent("a", b"y")
    assert not client_faults(), "404 and 412 are no faults, and each fault is reported once"


def test_a_throttled_listing_of_many_pages_is_complete(proxy: FaultProxy, store: Store, calm: Store) -> None:
    all_of(lambda i: calm.put(f"u/{i:05d}", b""), 5 * PAGE_KEYS + 3)
    proxy.inject(Faults(list_share=0.4))
    assert len(store.list("u")) == 5 * PAGE_KEYS + 3
    assert proxy.count("pass", "ListObjects") == 6
    assert proxy.count("slow_down", "ListObjects")


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_of_two_writers_exactly_one_wins(
    proxy: FaultProxy, store: Store, bucket: str, calm: Store, share: float
) -> None:
    proxy.inject(Faults(share, ("reset_after", "slow_down", "truncate")), seed=3)
    two = Store(store.root, store.options)
    start = threading.Barrier(2)

    def write(writer: int) -> list[bool]:
        mine = (store, two)[writer]
        won = []
        for i in range(OBJECTS):
            start.wait(60)
            won.append(mine.put_if_absent(f"u/{i}", b"%d wrote %d" % (writer, i)))
        return won

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(write, range(2))
    assert [a + b for a, b in zip(first, second, strict=True)] == [1] * OBJECTS
    winners = [0 if won else 1 for won in first]
    assert [calm.get(f"u/{i}") for i in range(OBJECTS)] == [b"%d wrote %d" % (w, i) for i, w in enumerate(winners)]
    assert proxy.injected


@pytest.mark.parametrize("kind", KINDS)
def test_each_fault_alone_is_survived_by_reads_and_commits(proxy: FaultProxy, store: Store, kind: str) -> None:
    store.put("warm", b"x" * 1000)
    for operation, act in {
        "PutObject": lambda: store.put_if_absent("u", b"mine"),
        "GetObject": lambda: store.get("warm") == b"x" * 1000,
        "ListObjects": lambda: len(store.list()) == 2,
        "DeleteObject": lambda: store.delete(["u"]) is None,
    }.items():
        proxy.inject(Faults(1.0, (kind,), frozenset((operation,)), at_most=1, stall_s=0.1))
        before = proxy.injected
        assert act(), operation
        assert proxy.injected == before + 1


@pytest.mark.parametrize("kind", ["truncate", "short"])
def test_a_reader_of_ranges_never_gets_a_truncated_answer(
    proxy: FaultProxy, store: Store, calm: Store, kind: str
) -> None:
    sink = io.BytesIO()
    table = pa.table({"n": list(range(4000)), "t": [f"caption {i}" for i in range(4000)]})
    pq.write_table(table, sink, row_group_size=1000)
    calm.put("a.parquet", sink.getvalue())
    calm.put("a.jsonl", b'{"caption": "text"}\n' * 4000)
    cut = Faults(1.0, (kind,), frozenset(("GetObject",)), at_most=3)
    proxy.inject(cut)
    with store.open_input("a.parquet") as file:
        assert pq.read_table(file).equals(table)
    proxy.inject(replace(cut, at_most=3))
    with store.open_input("a.jsonl", sequential=True) as file:
        assert file.read() == b'{"caption": "text"}\n' * 4000
    assert proxy.count(kind) == 6


def test_an_object_that_is_always_truncated_is_an_error(proxy: FaultProxy, store: Store, calm: Store) -> None:
    calm.put("u", b"x" * 100)
    proxy.inject(Faults(1.0, ("short",), frozenset(("GetObject",))))
    with pytest.raises(StorageError, match="only 50 of its 100 bytes arrived, 5 times in a row"):
        store.get("u")


def test_a_request_without_an_answer_is_repeated(
    proxy: FaultProxy, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "S3_READ_TIMEOUT_S", 2)
    stall_s = 600.0
    store.put("warm", b"x")
    proxy.inject(Faults(1.0, ("stall",), frozenset(("PutObject", "GetObject")), at_most=2, stall_s=stall_s))
    began = time.monotonic()
    assert store.put_if_absent("u", b"mine"), "the server stored it, and only the answer was lost"
    assert store.get("u") == b"mine"
    assert time.monotonic() - began < stall_s
    assert proxy.count("stall") == 2


def test_a_part_that_is_deleted_during_the_comparison_was_there_first(
    proxy: FaultProxy, store: Store, calm: Store
) -> None:
    """A second attempt commits while its group is compacted: the part exists, and is deleted a moment later."""
    calm.put("u", b"same size")
    proxy.inject(Faults(1.0, ("stall",), frozenset(("HeadObject",)), at_most=1, stall_s=1.0))

    def delete() -> None:
        while not proxy.count("stall"):
            time.sleep(0.01)
        calm.delete(["u"])

    with ThreadPoolExecutor(1) as pool:
        deleted = pool.submit(delete)
        assert store.put_if_absent("u", b"size same") is False
        deleted.result()


# ------------------------------------------------------------------------------------------------ a whole run


ROWS = 60


def write_input(store: Store) -> None:
    """A parquet shard of three row groups, and a file of JSON lines."""
    rows = [
        {
            "image_url": f"u{i}",
            "laion_2b": f"Portland Head Light {i} Maine" if i % 9 else None,
            "laion_coco": "A white lighthouse by the sea.",
        }
        for i in range(ROWS)
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=20)
    store.put("in/a.parquet", sink.getvalue())
    store.put("in/b.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def whole_run(store: Store, options: dict[str, str]) -> Manifest:
    """What the Ray graph strings together, without Ray: read, fuse (echo), judge, commit, compact, publish."""
    cfg = parse_config(
        FuseConfig,
        [f"input.path={store.url('in')}", f"output.path={store.url('out')}", "engine.kind=echo", "unit.rows=20"],
    )
    store = Store(cfg.output.path, options)
    shards = {shard.path: shard for shard in sources.discover(load_input(cfg, options), cfg.source)}
    assert not [shard for shard in shards.values() if shard.error], (
        "a failure of the store must not count as damage of a shard"
    )
    schema = sources.frozen_schema(tuple(shards.values()), cfg.source, cfg.filter)
    names = {field.name for field in PAIR_FIELDS}
    fields = tuple((field.name, str(field.type)) for field in schema if field.name not in names)
    spec = sources.ReadSpec(schema, cfg.source, cfg.filter, options)
    store.check_writable("_run")
    with Lease(store) as lease:
        plan = make_plan(tuple(shards.values()), {}, 20, fields)
        assert write_plan(store, plan)
        assert read_plans(store) == [plan]
        loop, prompts = start_loop(cfg.engine, cfg.decode, TEMPLATE)
        fuser = UnitFuser(cfg.engine, prompts, PoisonRowSearch(AttemptLog(store, lease.id), loop.generate).generate)

        def fuse(unit: WorkUnit) -> None:
            read = sources.read_rows(shards[unit.path], unit.start, unit.stop, spec)
            assert not read.unreadable
            batch = fuser.fuse(UnitBatch(unit, admit(read.table, cfg.gates), Apart()))
            part, summary = judge_unit(batch, fields, cfg.gates)
            assert commit(store, part, summary), "the only attempt"

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(fuse, plan.units))
        assert committed(store) == {unit.id for unit in plan.units}
        assert [summary.id for summary in read_summaries(store, plan.units)] == [unit.id for unit in plan.units]
        for group in sorted({unit.group for unit in plan.units}):
            compact_group(store, group, 1, [unit for unit in plan.units if unit.group == group], fields, cfg.output)
        lease.check()
        manifest = assemble([plan], read_groups(store), [{"revision": 1}])
        assert store.put_if_match(MANIFEST, manifest.to_bytes(), None)
    return manifest


def load_input(cfg: FuseConfig, options: dict[str, str]) -> InputConfig:
    return replace(cfg.input, storage=options)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_whole_run_through_faults_writes_the_files_of_a_calm_one(
    proxy: FaultProxy, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float
) -> None:
    folder = Store(str(tmp_path))
    write_input(folder)
    want = whole_run(folder, {})
    proxy.inject(Faults(share, list_share=share), seed=7)
    write_input(store)
    got = whole_run(store, store.options)
    assert [(file.kind, file.rows, file.path) for file in got.files] == [
        (file.kind, file.rows, file.path) for file in want.files
    ]
    kept, tried = Store(store.url("out"), store.options), Store(folder.url("out"))
    for file in want.files:
        assert read(kept, file.path) == read(tried, file.path)
    argv = [
        f"output.path={kept.root}",
        "deep=true",
        *(f"output.storage.{key}={value}" for key, value in kept.options.items()),
    ]
    assert run_job(VerifyConfig, verify, argv) == EXIT_DONE
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]["planned"] == 2 * ROWS
    assert proxy.injected > 10


def read(store: Store, path: str) -> list[dict[str, object]]:
    return pq.read_table(io.BytesIO(store.get(path)), partitioning=None).to_pylist()
