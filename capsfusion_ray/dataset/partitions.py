"""The partition folders of data files: a column's value -> `COLUMN=VALUE`, and back. Pure: knows no store."""

from __future__ import annotations

from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.compute as pc

BY_SHARD = "shard"  # output.partition_by: one folder per group of input shards, which is no column of the rows
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"  # what Hive, Spark, pyarrow and DuckDB write for a null key


def split_by_partition(rows: pa.Table, partition_by: str, group: str) -> list[tuple[str, pa.Table]]:
    """(partition folder, its rows) in ascending order of the column's value as text, null last; none for no rows."""
    if rows.num_rows == 0:
        return []
    if partition_by == BY_SHARD:
        return [(f"{BY_SHARD}={group}", rows)]
    keys = pc.cast(rows[partition_by], pa.string())
    out = []
    for value in sorted(pc.unique(keys).to_pylist(), key=lambda v: (v is None, v)):
        mask = pc.is_null(keys) if value is None else pc.fill_null(pc.equal(keys, value), False)
        out.append((folder_of(partition_by, value), rows.filter(mask)))
    return out


def folder_of(partition_by: str, value: str | None) -> str:
    """The folder of the rows with this value. The empty text has the folder of null, as in Hive."""
    # Quoted: a value is data; a slash or `..` in it must not become part of the path.
    name = quote(value, safe=" ").replace(".", "%2E") if value else NULL_PARTITION
    return f"{partition_by}={name}"


def value_of(path: str) -> str | None:
    """The column's value as text, from the path of a data file; None for null."""
    name = path.split("/")[1].partition("=")[2]
    return None if name == NULL_PARTITION else unquote(name)
