"""Rows between the two passes of a join: one object a read range, its buckets one after another, each readable by itself.

    _pair/exchange/raw-00003-000000500000.arrow     rows 500,000 and on of the raw table's shard 3
        the schema, then for every bucket in order one record batch (Arrow's IPC stream, lz4), or nothing
        partitions + 1 little-endian 64-bit offsets: bucket b lies at [offsets[b], offsets[b + 1])

Spark's sorted shuffle has the same shape: a file a bucket and range would be millions of objects. An object's name and bytes
follow from the input and the settings, so that it exists is the commit of its range. Knows no Ray.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capsfusion_ray.pairing.rules import BUCKET, read_spans, to_exchange
from capsfusion_ray.sources import ReadSpec, Shard, read_patiently
from capsfusion_ray.storage import Store, StoredFile, patiently

FOLDER = "_pair/exchange"
OBJECT_ROWS = 500_000  # of one object: about 120 MB of captions, URLs and keys in memory, of which three copies stand
READ_THREADS = 16  # a bucket is read from every object, and a store answers after milliseconds
OFFSET = np.dtype("<i8")


@dataclass(frozen=True)
class Table:
    """One side of the join, surveyed: what is read of which shards, and how."""

    side: str
    shards: tuple[Shard, ...]
    read: ReadSpec
    key: str  # the key's name in `read.schema`
    columns: dict[str, str]  # role -> the column that plays it
    carried: tuple[str, ...]

    @property
    def rows(self) -> int:
        return sum(shard.rows or 0 for shard in self.shards)


@dataclass(frozen=True)
class Span:
    """Neighbouring rows of a shard that are decoded together; every range of them becomes an object."""

    side: str
    number: int  # the shard's, in its table
    shard: Shard
    ranges: tuple[tuple[int, int], ...]

    def name(self, start: int) -> str:
        return f"{FOLDER}/{self.side}-{self.number:05d}-{start:012d}.arrow"

    @property
    def names(self) -> list[str]:
        return [self.name(start) for start, _ in self.ranges]

    def without(self, there: Container[str]) -> Span:
        """Its ranges that are no object yet."""
        return replace(self, ranges=tuple(span for span in self.ranges if self.name(span[0]) not in there))


def spans(table: Table) -> list[Span]:
    """Row groups are gathered up to an object's rows; a larger one is cut, and decoded once all the same."""
    return [
        Span(table.side, number, shard, tuple(ranges))
        for number, shard in enumerate(table.shards)
        for ranges in read_spans(shard.row_groups if shard.rows else (), OBJECT_ROWS, OBJECT_ROWS)
    ]


def distribute(
    span: Span, table: Table, normalise: str, partitions: int, schema: pa.Schema, store: Store
) -> Iterator[str]:
    """The first pass: read a span and write its objects; their names, as they are written."""
    for unit in read_patiently(span.shard, span.ranges, table.read):
        unreadable = sum(lost.stop - lost.start for lost in unit.unreadable)
        rows = to_exchange(
            span.side, span.number, unit.table, table.key, table.carried, unreadable, normalise, partitions, schema
        )
        name = span.name(unit.start)
        patiently(partial(store.put, name, pack(rows, partitions)))
        yield name


def pack(rows: pa.Table, partitions: int) -> bytes:
    """An object's bytes."""
    rows = rows.take(pc.sort_indices(rows, [(BUCKET, "ascending")])).combine_chunks()
    borders = np.searchsorted(rows[BUCKET].to_numpy(), np.arange(partitions + 1)).tolist()
    offsets = np.empty(partitions + 1, OFFSET)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as stream:
        stream.write_batch(pa.RecordBatch.from_pylist([], rows.schema))  # makes Arrow write the schema now
        for bucket, (start, stop) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
            offsets[bucket] = sink.tell()
            if stop > start:
                stream.write_table(rows.slice(start, stop - start), max_chunksize=stop - start)
        offsets[partitions] = sink.tell()
    sink.write(offsets.tobytes())
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def offsets_of(store: Store, objects: Sequence[StoredFile], partitions: int) -> np.ndarray:
    """Where the buckets lie: a row an object, of partitions + 1 offsets."""
    tail = (partitions + 1) * OFFSET.itemsize

    def read(found: StoredFile) -> np.ndarray:
        return np.frombuffer(patiently(lambda: store.get_range(found.path, found.size - tail, found.size)), OFFSET)

    with ThreadPoolExecutor(READ_THREADS) as pool:
        return np.stack(list(pool.map(read, objects)))


def read_bucket(store: Store, names: Sequence[str], offsets: np.ndarray, bucket: int, schema: pa.Schema) -> pa.Table:
    """The rows of a bucket, from every object that has any."""

    def read(name: str, start: int, stop: int) -> pa.RecordBatch:
        data = patiently(lambda: store.get_range(name, start, stop))
        return pa.ipc.read_record_batch(pa.ipc.read_message(data), schema)

    lies = [
        (name, int(row[bucket]), int(row[bucket + 1]))
        for name, row in zip(names, offsets, strict=True)
        if row[bucket + 1] > row[bucket]
    ]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        batches = list(pool.map(lambda place: read(*place), lies))
    return pa.Table.from_batches(batches, schema)
