"""Shuffle files, which hold the rows between the two passes of a join: one file per row range, with its buckets one after another.

    _pair/exchange/raw-00003-000000500000.arrow     the rows of the raw table's shard 3 from row 500,000 on
        the schema, then for every bucket in order one record batch (Arrow's IPC stream, lz4), or nothing
        partitions + 1 little-endian 64-bit offsets: bucket b is at [offsets[b], offsets[b + 1])

A bucket can be read from a file without the others. Spark's sorted shuffle has the same format, because one file per bucket and
range would be millions of objects. The name and the bytes of a file follow from the input and the settings alone, so an
existing file means that its range is done. Knows no Ray.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capsfusion_ray.pairing.shuffle_rows import BUCKET, TableShuffle
from capsfusion_ray.sources import ReadSpec, Shard, read_patiently
from capsfusion_ray.storage import Store, StoredFile, patiently

FOLDER = "_pair/exchange"
FILE_ROWS = 500_000  # of one shuffle file: about 120 MB of captions, URLs and keys in memory, in three copies
READ_THREADS = 16  # a bucket is read from every shuffle file, and each answer of a store takes milliseconds
OFFSET = np.dtype("<i8")


@dataclass(frozen=True)
class Table:
    """One of the two tables after its survey: its shards, and how they are read."""

    side: str
    shards: tuple[Shard, ...]
    read: ReadSpec
    key: str  # the column of the key in `read.schema`
    columns: dict[str, str]  # role (caption, key, url) -> the column of the shards
    carried: tuple[str, ...]  # passthrough columns

    @property
    def rows(self) -> int:
        """Of all readable shards."""
        return sum(shard.rows or 0 for shard in self.shards)


@dataclass(frozen=True)
class TableReadTask:
    """Neighbouring row ranges of a shard that one task decodes together; every range becomes a shuffle file."""

    side: str
    number: int  # of the shard in its table
    shard: Shard
    ranges: tuple[tuple[int, int], ...]

    def name(self, start: int) -> str:
        """The shuffle file of the range that begins at row `start`."""
        return f"{FOLDER}/{self.side}-{self.number:05d}-{start:012d}.arrow"

    @property
    def names(self) -> list[str]:
        """The shuffle files of all ranges."""
        return [self.name(start) for start, _ in self.ranges]

    def without(self, there: Container[str]) -> TableReadTask:
        """The task with only those ranges whose file is not in `there`."""
        return replace(self, ranges=tuple(each for each in self.ranges if self.name(each[0]) not in there))


def read_tasks(table: Table) -> list[TableReadTask]:
    """The read tasks of a table. Row groups are gathered up to FILE_ROWS; a larger one is cut, and still decoded once."""
    return [
        TableReadTask(table.side, number, shard, tuple(ranges))
        for number, shard in enumerate(table.shards)
        for ranges in task_ranges(shard.row_groups if shard.rows else (), FILE_ROWS, FILE_ROWS)
    ]


def task_ranges(row_groups: Sequence[int], task_rows: int, file_rows: int) -> list[list[tuple[int, int]]]:
    """The row ranges [start, stop) of each read task of a shard, of at most `file_rows` rows each.

    Small row groups are gathered up to `task_rows`. A larger one is a task of its own, so that each is decoded once.
    """
    tasks: list[tuple[int, int]] = []
    start = stop = 0
    for group_rows in row_groups:
        if stop > start and stop - start + group_rows > task_rows:
            tasks.append((start, stop))
            start = stop
        stop += group_rows
    if stop > start:
        tasks.append((start, stop))
    return [[(at, min(at + file_rows, b)) for at in range(a, b, file_rows)] for a, b in tasks]


def write_shuffle_files(task: TableReadTask, read: ReadSpec, shuffle: TableShuffle, store: Store) -> Iterator[str]:
    """The first pass: read the rows of a task and write its shuffle files; yields the name of each after it is written."""
    for unit in read_patiently(task.shard, task.ranges, read):
        unreadable = sum(lost.stop - lost.start for lost in unit.unreadable)
        rows = shuffle.rows(task.number, unit.table, unreadable)
        name = task.name(unit.start)
        patiently(partial(store.put, name, pack(rows, shuffle.partitions)))
        yield name


def pack(rows: pa.Table, partitions: int) -> bytes:
    """The bytes of a shuffle file."""
    rows = rows.take(pc.sort_indices(rows, [(BUCKET, "ascending")])).combine_chunks()
    borders = np.searchsorted(rows[BUCKET].to_numpy(), np.arange(partitions + 1)).tolist()
    offsets = np.empty(partitions + 1, OFFSET)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as stream:
        stream.write_batch(
            pa.RecordBatch.from_pylist([], rows.schema)
        )  # an empty batch makes Arrow write the schema now
        for bucket, (start, stop) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
            offsets[bucket] = sink.tell()
            if stop > start:
                stream.write_table(rows.slice(start, stop - start), max_chunksize=stop - start)
        offsets[partitions] = sink.tell()
    sink.write(offsets.tobytes())
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def offsets_of(store: Store, files: Sequence[StoredFile], partitions: int) -> np.ndarray:
    """Where the buckets are: one row per shuffle file, of partitions + 1 offsets."""
    tail = (partitions + 1) * OFFSET.itemsize

    def read(found: StoredFile) -> np.ndarray:
        return np.frombuffer(patiently(lambda: store.get_range(found.path, found.size - tail, found.size)), OFFSET)

    with ThreadPoolExecutor(READ_THREADS) as pool:
        return np.stack(list(pool.map(read, files)))


def read_bucket(store: Store, names: Sequence[str], offsets: np.ndarray, bucket: int, schema: pa.Schema) -> pa.Table:
    """The rows of a bucket, from every shuffle file that has any."""

    def read(name: str, start: int, stop: int) -> pa.RecordBatch:
        data = patiently(lambda: store.get_range(name, start, stop))
        return pa.ipc.read_record_batch(pa.ipc.read_message(data), schema)

    places = [
        (name, int(row[bucket]), int(row[bucket + 1]))
        for name, row in zip(names, offsets, strict=True)
        if row[bucket + 1] > row[bucket]
    ]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        batches = list(pool.map(lambda place: read(*place), places))
    return pa.Table.from_batches(batches, schema)
