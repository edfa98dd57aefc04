"""Read the rows of a data file, unit by unit, with the partition's column back in its place. Knows the store; writes nothing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from capsfusion_ray.core.columns import ROW_ID, type_of_name
from capsfusion_ray.core.parquet import open_parquet
from capsfusion_ray.dataset.damage import read_intact
from capsfusion_ray.dataset.manifest import FileEntry
from capsfusion_ray.dataset.partitions import BY_SHARD, value_of
from capsfusion_ray.storage import Store


@dataclass(frozen=True)
class RowReader:
    """Reads the data files of one output. `fields`: the reference and passthrough columns, as its plans hold them."""

    store: Store
    fields: tuple[tuple[str, str], ...]
    partition_by: str

    def rows_of(self, file: FileEntry) -> list[tuple[str, pa.Table]]:
        """(unit id, its rows) of one file, in the order of the file. Raises AccountingError for a damaged file."""
        return self.rows_in(file, read_intact(self.store, file))

    def rows_in(self, file: FileEntry, data: bytes) -> list[tuple[str, pa.Table]]:
        """As rows_of, for a caller who has read the file's bytes."""
        table = open_parquet(io.BytesIO(data), where=self.store.url(file.path)).read()
        if self.partition_by != BY_SHARD:
            table = table.append_column(self.partition_by, self._partition_column(file.path, table.num_rows))
        out, at = [], 0
        for unit_id, rows in file.units:
            out.append((unit_id, table.slice(at, rows)))
            at += rows
        return out

    def _partition_column(self, path: str, rows: int) -> pa.Array:
        type_ = type_of_name(dict(self.fields)[self.partition_by])
        return pa.array([value_of(path)] * rows, pa.string()).cast(type_)


def in_row_order(tables: Sequence[pa.Table]) -> pa.Table:
    """One unit's rows of several tables, in the order of the input: files of different partitions interleave them."""
    table = pa.concat_tables(tables, promote_options="default")
    numbers = [int(row_id.rpartition(":")[2]) for row_id in table[ROW_ID].to_pylist()]
    return table.take(pa.array(sorted(range(len(numbers)), key=numbers.__getitem__), pa.int64()))
