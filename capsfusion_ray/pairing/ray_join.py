"""The two passes of a join as Ray Data tasks: distribute the rows of both tables into buckets, join each bucket.

    distribute    one task per read task: read its row ranges, order the rows by bucket, write one shuffle file per range
    join          one task per bucket: read it from every shuffle file, join it, write its data file, then its audit

A task whose result exists is not run again. Ray Data's own shuffle (`groupby`, tried here) is not used, because it keeps all rows in
actors, and a killed node loses them. Dataset.join is not used, because it needs polars and returns every combination of duplicates.
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
from capsfusion_ray.pairing.audit import Audit
from capsfusion_ray.pairing.bucket_join import join_bucket
from capsfusion_ray.pairing.shuffle_files import (
    FOLDER,
    Table,
    TableReadTask,
    offsets_of,
    read_bucket,
    read_tasks,
    write_shuffle_files,
)
from capsfusion_ray.pairing.shuffle_rows import TableShuffle, shuffle_schema
from capsfusion_ray.run.ray_data import ReadTask, TaskSource, as_raised, data_context
from capsfusion_ray.storage import Store, StoredFile, patiently, write_note

log = logging.getLogger(__name__)
BUCKETS = "_pair/buckets"
TASK_CPUS = 1.0  # at most as many tasks as cores run at once, which bounds memory: each holds its rows three times
ROW_GROUP_ROWS = 16_384  # of a data file


@dataclass(frozen=True)
class Join:
    """What both passes need. It is sent to the workers once."""

    tables: dict[str, Table]  # by side
    partitions: int
    normalise: str
    duplicates: str
    store: Store

    @property
    def carried(self) -> list[pa.Field]:
        """The passthrough columns of both tables, raw first. The key is among them only if it was asked for."""
        return [table.read.schema.field(name) for table in self.tables.values() for name in table.carried]

    def shuffle(self, side: str) -> TableShuffle:
        """How the rows of one table become rows of shuffle files."""
        table = self.tables[side]
        return TableShuffle(
            side, table.key, table.carried, self.normalise, self.partitions, shuffle_schema(self.carried)
        )


def run_join(join: Join) -> Audit:
    """Run both passes, each from where a killed run stopped. The shuffle files stay until `sweep`."""
    shared = ray.put(replace(join, tables={side: replace(table, shards=()) for side, table in join.tables.items()}))
    tasks = [task for table in join.tables.values() for task in read_tasks(table)]
    _distribute(join, shared, tasks)
    return _join_buckets(join, shared, _all_files(join.store, tasks))


def _distribute(join: Join, shared: Any, tasks: Sequence[TableReadTask]) -> None:
    """The first pass. `shared` is the Join without its shards: a task brings its own, or each would unpickle all 10,000."""
    there = {file.path for file in join.store.list(FOLDER)}
    missing = [task.without(there) for task in tasks if not there.issuperset(task.names)]
    log.info("distributing: %d of %d read tasks", len(missing), len(tasks))
    for _ in outcomes("Distribute", [_Distribute(shared, task) for task in missing]):
        pass


def _all_files(store: Store, tasks: Sequence[TableReadTask]) -> list[StoredFile]:
    """The shuffle files of all tasks. Raises AccountingError if one is missing."""
    wanted = {name for task in tasks for name in task.names}
    files = [file for file in store.list(FOLDER) if file.path in wanted]
    if len(files) < len(wanted):
        raise AccountingError(
            f"{store.root}: {len(wanted) - len(files)} of {len(wanted)} shuffle files are gone, as if another driver had "
            "finished this pairing meanwhile; nothing was overwritten: run the same command again"
        )
    return files


def _join_buckets(join: Join, shared: Any, files: Sequence[StoredFile]) -> Audit:
    """The second pass; the audit of all buckets, those of a killed run included."""
    places = ray.put(([file.path for file in files], offsets_of(join.store, files, join.partitions)))
    done = {file.path for file in join.store.list(BUCKETS)}
    left = [bucket for bucket in range(join.partitions) if _note(bucket) not in done]
    log.info("joining: %d of %d buckets", len(left), join.partitions)
    audit = sum((_noted(join.store, path) for path in sorted(done)), Audit())
    return sum(map(_parsed, outcomes("Join", [_JoinBucket(shared, places, bucket) for bucket in left])), audit)


def outcomes(name: str, tasks: Sequence[Callable[[], Iterable[pa.Table]]]) -> Iterator[str]:
    """Run every task; yields the texts that the tasks yield, as they come."""
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
    """A task of the first pass."""

    shared: Any  # ObjectRef of the Join without shards
    task: TableReadTask

    def __call__(self) -> Iterable[pa.Table]:
        join = ray.get(self.shared)
        read, shuffle = join.tables[self.task.side].read, join.shuffle(self.task.side)
        for name in write_shuffle_files(self.task, read, shuffle, join.store):
            yield pa.table({"outcome": [name]})


@dataclass(frozen=True)
class _JoinBucket:
    """A task of the second pass."""

    shared: Any
    places: Any  # ObjectRef of the names and offsets of the shuffle files
    bucket: int

    def __call__(self) -> Iterable[pa.Table]:
        join, (names, offsets) = ray.get([self.shared, self.places])
        rows = read_bucket(join.store, names, offsets, self.bucket, shuffle_schema(join.carried))
        yield pa.table({"outcome": [json.dumps(asdict(write_bucket(rows, self.bucket, join)))]})


def write_bucket(rows: pa.Table, bucket: int, join: Join) -> Audit:
    """Join one bucket, write its data file if it has a pair, and last its audit.

    Nothing is written if the bucket has duplicates and join.duplicates is "refuse".
    """
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
    """Delete the shuffle files and the audits of single buckets, which only an unfinished run needs."""
    store.delete([file.path for folder in (FOLDER, BUCKETS) for file in store.list(folder)])
    store.delete_leftovers()  # of killed writers
