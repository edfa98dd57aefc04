"""Write rows into data files: one frozen schema per kind of file, partition folders, and files of the configured size.

Every name and every byte follows from the rows and their order alone. Knows the store; no Ray.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from capsfusion_ray.config import OutputConfig
from capsfusion_ray.core.columns import OUTCOME, OUTPUT_TOKENS, PROMPT_TOKENS, REJECT_FIELDS, part_schema
from capsfusion_ray.dataset.layout import DATA_DIR, DATA_FOLDERS, data_file_path, data_file_prefix
from capsfusion_ray.dataset.manifest import FileEntry
from capsfusion_ray.dataset.partitions import split_by_partition
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.storage import Store

ROW_GROUP_ROWS = (
    16_384  # about 2 MB of captions with zstd; a file ends at a row group, so this is how exact its size is
)
MAX_PARTITIONS = 1000


def data_schema(fields: Sequence[tuple[str, str]], kind: str, partition_by: str) -> pa.Schema:
    """The schema of all data files of a kind (one of layout.DATA_FOLDERS). `fields`: the plan's extra columns.

    It lacks the partition's column, which is in the path: pyarrow refuses a dataset that has it in both.
    """
    reject_names = {field.name for field in REJECT_FIELDS}
    dropped = {OUTCOME, PROMPT_TOKENS, OUTPUT_TOKENS, partition_by} | (reject_names if kind == DATA_DIR else set())
    return pa.schema([field for field in part_schema(fields) if field.name not in dropped])


@dataclass
class _Writer:
    """Cuts one stream of rows into files of the configured size. `prefix`: of their names (layout.data_file_prefix)."""

    store: Store
    prefix: str
    kind: str
    schema: pa.Schema
    output: OutputConfig

    def __post_init__(self) -> None:
        self.files: list[FileEntry] = []
        self._buffered: list[pa.Table] = []
        self._buffered_rows = 0
        self._open()

    def _open(self) -> None:
        self._sink = io.BytesIO()
        self._parquet: pq.ParquetWriter | None = None
        self._rows = 0
        self._units: dict[str, int] = {}

    def write(self, unit_id: str, table: pa.Table) -> None:
        at = 0
        while at < table.num_rows:
            room = ROW_GROUP_ROWS - self._buffered_rows
            if self.output.target_file_rows:
                room = min(room, self.output.target_file_rows - self._rows - self._buffered_rows)
            piece = table.slice(at, room)
            at += piece.num_rows
            self._buffered.append(piece)
            self._buffered_rows += piece.num_rows
            self._units[unit_id] = self._units.get(unit_id, 0) + piece.num_rows
            if piece.num_rows == room:
                self._flush_row_group()
                if self._rows == self.output.target_file_rows or self._sink.tell() >= self.output.target_file_mb * 1e6:
                    self.close()

    def _flush_row_group(self) -> None:
        if self._parquet is None:
            self._parquet = pq.ParquetWriter(self._sink, self.schema, compression="zstd")
        self._parquet.write_table(pa.concat_tables(self._buffered), row_group_size=ROW_GROUP_ROWS)
        self._rows += self._buffered_rows
        self._buffered, self._buffered_rows = [], 0

    def close(self) -> None:
        """Write the file that is open, if it has rows; a later write() opens the next one."""
        if self._buffered_rows:
            self._flush_row_group()
        if self._parquet is None:
            return
        self._parquet.close()
        data = self._sink.getvalue()
        path = data_file_path(self.prefix, len(self.files))
        self.store.put(path, data)
        units = tuple(self._units.items())
        self.files.append(FileEntry(path, self.kind, self._rows, len(data), hashlib.sha256(data).hexdigest(), units))
        self._open()


class FileSet:
    """The data files of one group that are written together. `stamp`: layout.of_plan or layout.of_edition."""

    def __init__(
        self, store: Store, group: str, stamp: str, fields: Sequence[tuple[str, str]], output: OutputConfig
    ) -> None:
        self._store, self._group, self._stamp, self._fields, self._output = store, group, stamp, fields, output
        self._writers: dict[tuple[str, str], _Writer] = {}

    def write(self, kind: str, unit_id: str, rows: pa.Table) -> None:
        """Append a unit's rows of a kind. Raises ConfigError for more than MAX_PARTITIONS partition values."""
        for partition, slice_ in split_by_partition(rows, self._output.partition_by, self._group):
            writer = self._writer(kind, partition)
            writer.write(unit_id, slice_.select(writer.schema.names).cast(writer.schema))

    def _writer(self, kind: str, partition: str) -> _Writer:
        by = self._output.partition_by
        if (kind, partition) not in self._writers:
            if len(self._writers) >= len(DATA_FOLDERS) * MAX_PARTITIONS:
                raise ConfigError(
                    f"output.partition_by={by}: more than {MAX_PARTITIONS} values in group {self._group} alone; partition by a "
                    "column with fewer values, or by shard"
                )
            prefix = data_file_prefix(kind, partition, self._stamp, self._group)
            self._writers[kind, partition] = _Writer(
                self._store, prefix, kind, data_schema(self._fields, kind, by), self._output
            )
        return self._writers[kind, partition]

    def close(self) -> tuple[FileEntry, ...]:
        """Write the rows that are still in memory; the entries of all files, in order of kind and partition."""
        files: list[FileEntry] = []
        for key in sorted(self._writers):
            self._writers[key].close()
            files.extend(self._writers[key].files)
        return tuple(files)
