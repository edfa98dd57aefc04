"""A finished group's parts -> the dataset's files, then one group entry, then the parts are removed.

Every name and every byte follows from the parts alone, so that a compaction killed half way and repeated writes the
same files over again. Knows the store; no Ray.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capsfusion_ray.config import OutputConfig
from capsfusion_ray.errors import AccountingError, ConfigError
from capsfusion_ray.manifest import FileEntry, GroupEntry, group_path
from capsfusion_ray.parts import part_path, part_schema, read_part
from capsfusion_ray.plan import MAX_PARTITIONS
from capsfusion_ray.rows import OUTCOME, OUTPUT_TOKENS, PROMPT_TOKENS, REJECT_FIELDS, Outcome, WorkUnit
from capsfusion_ray.storage import Store

ROW_GROUP_ROWS = 16_384  # about 2 MB of captions with zstd: the grain at which a file can meet target_file_mb
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"  # what Hive, Spark, pyarrow and DuckDB write for a null key


def data_schema(fields: Sequence[tuple[str, str]], kind: str, partition_by: str) -> pa.Schema:
    """The one frozen schema of all files of a kind. The partition column is in the path alone: pyarrow refuses both."""
    reject_names = {field.name for field in REJECT_FIELDS}
    dropped = {OUTCOME, PROMPT_TOKENS, OUTPUT_TOKENS, partition_by} | (reject_names if kind == "data" else set())
    return pa.schema([field for field in part_schema(fields) if field.name not in dropped])


@dataclass
class _Writer:
    """Cuts one stream of rows into files of the size asked for."""

    store: Store
    folder: str
    kind: str
    basename: str
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
        if self._buffered_rows:
            self._flush_row_group()
        if self._parquet is None:
            return
        self._parquet.close()
        data = self._sink.getvalue()
        path = f"{self.folder}/{self.basename}-{len(self.files):05d}.parquet"
        self.store.put(path, data)
        units = tuple(self._units.items())
        self.files.append(FileEntry(path, self.kind, self._rows, len(data), hashlib.sha256(data).hexdigest(), units))
        self._open()


def compact_group(
    store: Store,
    group: str,
    revision: int,
    units: Sequence[WorkUnit],
    fields: Sequence[tuple[str, str]],
    output: OutputConfig,
) -> GroupEntry:
    """Write the files of one group whose units are all committed, its entry, and remove its parts. Repeatable.

    Raises AccountingError where rows do not add up, ConfigError for more than MAX_PARTITIONS partition values.
    """
    entry_path = group_path(group, revision)
    if store.exists(entry_path):  # killed between the entry and the removal of the parts
        entry = GroupEntry.from_bytes(store.get(entry_path))
        remove_parts(store, units)
        return entry
    writers: dict[tuple[str, str], _Writer] = {}
    summaries = []
    for unit in units:
        table, summary = read_part(store, unit)
        summaries.append(summary)
        rejected = pc.equal(table[OUTCOME], str(Outcome.REJECTED))
        for kind, rows in (("data", table.filter(pc.invert(rejected))), ("rejected", table.filter(rejected))):
            for partition, slice_ in _partitions(rows, output.partition_by, group):
                key = (kind, partition)
                if key not in writers:
                    if len(writers) >= 2 * MAX_PARTITIONS:
                        raise ConfigError(
                            f"output.partition_by={output.partition_by}: more than {MAX_PARTITIONS} values in group {group} "
                            "alone; partition by a coarser column, or by shard"
                        )
                    # The group's name keeps files of different groups apart inside one partition.
                    basename = f"part-r{revision:03d}" if output.partition_by == "shard" else f"part-r{revision:03d}-{group}"
                    schema = data_schema(fields, kind, output.partition_by)
                    writers[key] = _Writer(store, f"{kind}/{partition}", kind, basename, schema, output)
                writers[key].write(unit.id, slice_.select(writers[key].schema.names).cast(writers[key].schema))
    files: list[FileEntry] = []
    for key in sorted(writers):
        writers[key].close()
        files.extend(writers[key].files)
    entry = GroupEntry(group, revision, tuple(summaries), tuple(files))
    check_group(entry)
    if not store.put_if_absent(entry_path, entry.to_bytes()):
        entry = GroupEntry.from_bytes(store.get(entry_path))
    remove_parts(store, units)
    return entry


def _partitions(rows: pa.Table, partition_by: str, group: str) -> list[tuple[str, pa.Table]]:
    if rows.num_rows == 0:
        return []
    if partition_by == "shard":
        return [(f"shard={group}", rows)]
    keys = pc.cast(rows[partition_by], pa.string())
    out = []
    for value in sorted(pc.unique(keys).to_pylist(), key=lambda v: (v is None, v)):
        mask = pc.is_null(keys) if value is None else pc.fill_null(pc.equal(keys, value), False)
        # quote: a value is data; a slash or `..` in it must not become a path.
        name = NULL_PARTITION if not value else quote(value, safe=" ").replace(".", "%2E")
        out.append((f"{partition_by}={name}", rows.filter(mask)))
    return out


def check_group(entry: GroupEntry) -> None:
    """Raises AccountingError unless the files hold exactly the units' rows."""
    for kind, names in (("data", ("fused", "kept")), ("rejected", ("rejected",))):
        want: dict[str, Any] = {unit.id: sum(getattr(unit, name) for name in names) for unit in entry.units}
        have = dict.fromkeys(want, 0)
        for file in entry.files:
            if file.kind == kind:
                for unit_id, rows in file.units:
                    have[unit_id] = have.get(unit_id, 0) + rows
        if want != have:
            wrong = sorted(unit for unit in have if want.get(unit) != have[unit])
            raise AccountingError(f"group {entry.group}: {kind} rows of units {wrong[:3]} do not add up")


def remove_parts(store: Store, units: Sequence[WorkUnit]) -> None:
    """Remove the parts of units whose group entry stands; a part that is gone already is no error."""
    store.delete([part_path(unit.id) for unit in units])
