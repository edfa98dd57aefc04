"""The dataclasses of reading: a shard, how it is read, what a read returns. Knows no file format."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from capsfusion_ray.config import FilterConfig, SourceConfig
from capsfusion_ray.core.types import FilterReason
from capsfusion_ray.errors import StorageError

BATCH_ROWS = 8192  # rows per decoded batch: 2-3 MB of captions, whatever the size of the row group

# What decoders raise for damaged bytes. A failing store raises StorageError, which is none of these and is retried.
DAMAGE = (pa.ArrowException, OSError, ValueError, EOFError, RecursionError)


def damage_of(error: BaseException, where: str) -> str:
    """The text that names a DAMAGE error in the accounting; `where` names the file.

    Raises StorageError if a mounted file system failed (EIO, ESTALE, …), because a later read may succeed. The OSError of a
    decoder has no errno, except EINVAL for a damaged offset that is outside of the file.
    """
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        raise StorageError(f"cannot read {where}: {error}") from error
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


@dataclass(frozen=True, slots=True)
class Shard:
    """One input file.

    `Store(root).open_input(file)` opens it. `path` is its name in row ids, and unique in the run. `size` is in bytes.
    `content_key` changes with the content, and never with a time stamp. `row_groups` are row counts; a text file has one
    row group. `error` is empty, or says why nothing of this shard can be read (then `rows` is None). `refused`: column ->
    the Arrow extension type because of which the column is not read.
    """

    root: str
    file: str
    path: str
    size: int
    content_key: str = ""
    format: str = ""
    compression: str = ""
    rows: int | None = None
    row_groups: tuple[int, ...] = ()
    schema: pa.Schema | None = None
    error: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReadSpec:
    """How all shards of a run are read: `schema` comes from `frozen_schema`; `options` are those of the input's store."""

    schema: pa.Schema
    source: SourceConfig
    filter: FilterConfig
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class UnreadableRange:
    """Rows [start, stop) of a shard that cannot be read because of damage."""

    start: int
    stop: int
    error: str


@dataclass(frozen=True, slots=True)
class UnitRows:
    """The result of reading rows [start, stop) of a shard.

    stop - start = table.num_rows + sum(filtered.values()) + the rows of `unreadable`. `table` has the frozen schema and
    the column INVALID: null, or why the row cannot be used ("laion_2b" or "laion_coco": that caption is not UTF-8 and was
    repaired; "json", "csv" or "tsv": the line cannot be parsed).
    """

    start: int
    stop: int
    table: pa.Table
    filtered: Mapping[FilterReason, int]
    unreadable: tuple[UnreadableRange, ...] = ()


@dataclass(frozen=True, slots=True)
class Decoded:
    """Rows of a file from row `start` on, with the column names and types of the file."""

    start: int
    table: pa.Table
    broken: pa.Array | None = None  # strings: null, or the format in which the row cannot be parsed

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return self.start + int(self.table.num_rows)
