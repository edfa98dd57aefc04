"""The two passes of a join as Ray Data tasks: distribute the rows of both tables into buckets, join each bucket.

    distribute    a task a span of rows: read, ordered by bucket, an object a range (exchange.py)
    join          a task a bucket: read from every object, joined (pairing.py), its part written, then its audit

What is written is not done again. Not used, and why: Ray Data's own shuffle (`groupby`, tried here) keeps all rows in actors, with
which a killed node takes them along; Dataset.join needs polars, and keeps every combination of duplicates.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from capsfusion_ray.errors import AccountingError
from capsfusion_ray.pairing import shuffle_files as exchange
from capsfusion_ray.pairing.rules import Audit, exchange_schema, join_bucket
from capsfusion_ray.pairing.shuffle_files import Span, Table
from capsfusion_ray.run.ray_data import ReadTask, TaskSource, as_raised, data_context
from capsfusion_ray.storage import Store, patiently, write_note

log = logging.getLogger(__name__)
BUCKETS = "_pair/buckets"
TASK_CPUS = 1.0  # by which memory is bounded: as many tasks as cores, each with its rows three times over
ROW_GROUP_ROWS = 16_384  # of a part


@dataclass(frozen=True)
class Join:
    """What both passes must know; travels to the workers once."""

    tables: dict[str, Table]  # by side
    partitions: int
    normalise: str
    duplicates: str
    store: Store

    @property
    def carried(self) -> list[pa.Field]:
        """The columns carried along, raw's first. The key is not among them unless it was asked for."""
        return [table.read.schema.field(name) for table in self.tables.values() for name in table.carried]


def run_join(join: Join) -> Audit:
    """Both passes, from wherever a killed run left them. The objects between them stay until `sweep`."""
    store, schema = join.store, exchange_schema(join.carried)
    spans = [span for table in join.tables.values() for span in exchange.spans(table)]
    there = {file.path for file in store.list(exchange.FOLDER)}
    missing = [span.without(there) for span in spans if not there.issuperset(span.names)]
    log.info("distributing: %d of %d spans of rows", len(missing), len(spans))
    # Without the shards: a span brings its own, and 10,000 of them would be unpickled by every task.
    tables = {side: replace(table, shards=()) for side, table in join.tables.items()}
    shared = ray.put((replace(join, tables=tables), schema))
    for _ in outcomes("Distribute", [_Distribute(shared, span) for span in missing]):
        pass

    wanted = {name for span in spans for name in span.names}
    objects = [file for file in store.list(exchange.FOLDER) if file.path in wanted]
    if len(objects) < len(wanted):
        raise AccountingError(
            f"{store.root}: {len(wanted) - len(objects)} of {len(wanted)} objects between the passes are gone, as if another driver had "
            "ended this pairing meanwhile; nothing was overwritten: run the same command again"
        )
    places = ray.put(([file.path for file in objects], exchange.offsets_of(store, objects, join.partitions)))
    done = {file.path for file in store.list(BUCKETS)}
    left = [bucket for bucket in range(join.partitions) if _note(bucket) not in done]
    log.info("joining: %d of %d buckets", len(left), join.partitions)
    audit = sum((_noted(store, path) for path in sorted(done)), Audit())
    return sum(map(_parsed, outcomes("Join", [_JoinBucket(shared, places, bucket) for bucket in left])), audit)


def outcomes(name: str, tasks: Sequence[Callable[[], Iterable[pa.Table]]]) -> Iterator[str]:
    """Run every task; what they yielded, a row at a time, as it comes."""
    if not tasks:
        return
    data_context()
    source = TaskSource(name, [ReadTask(task) for task in tasks])
    dataset = ray.data.read_datasource(source, override_num_blocks=len(tasks), num_cpus=TASK_CPUS)
    with as_raised():
        for row in dataset.iter_rows():
            yield row["outcome"]


@dataclass(frozen=True)
class _Distribute:
    """The first pass's task."""

    shared: Any  # ObjectRef of the Join and the schema of the exchange
    span: Span

    def __call__(self) -> Iterable[pa.Table]:
        join, schema = ray.get(self.shared)
        table = join.tables[self.span.side]
        for name in exchange.distribute(self.span, table, join.normalise, join.partitions, schema, join.store):
            yield pa.table({"outcome": [name]})


@dataclass(frozen=True)
class _JoinBucket:
    """The second pass's task."""

    shared: Any
    places: Any  # ObjectRef of the objects' names and offsets
    bucket: int

    def __call__(self) -> Iterable[pa.Table]:
        (join, schema), (names, offsets) = ray.get([self.shared, self.places])
        rows = exchange.read_bucket(join.store, names, offsets, self.bucket, schema)
        yield pa.table({"outcome": [json.dumps(asdict(write_bucket(rows, self.bucket, join)))]})


def write_bucket(rows: pa.Table, bucket: int, join: Join) -> Audit:
    """Join one bucket, write its part, unless it holds no pair, and last its audit; nothing where duplicates are to be refused."""
    pairs, audit = join_bucket(rows, join.carried)
    if join.duplicates == "refuse" and (audit.raw.duplicates or audit.synthetic.duplicates):
        return audit
    if pairs.num_rows:
        sink = io.BytesIO()
        pq.write_table(pairs, sink, compression="zstd", row_group_size=ROW_GROUP_ROWS)
        patiently(lambda: join.store.put(f"part-{bucket:05d}.parquet", sink.getvalue()))
    patiently(lambda: write_note(join.store, _note(bucket), audit))
    return audit


def _note(bucket: int) -> str:
    return f"{BUCKETS}/{bucket:05d}.json"


def _parsed(text: str | bytes) -> Audit:
    return Audit.from_dict(json.loads(text))


def _noted(store: Store, path: str) -> Audit:
    return _parsed(store.get(path))


def sweep(store: Store) -> None:
    """Delete what stands between the passes, and what a killed run needs to go on."""
    store.delete([file.path for folder in (exchange.FOLDER, BUCKETS) for file in store.list(folder)])
    store.delete_leftovers()  # of killed writers
