"""The nouns of reading: a shard, what a read gives back, what could not be read. Knows no file format."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from capsfusion_ray.config import FilterConfig, SourceConfig
from capsfusion_ray.core.types import FilterReason
from capsfusion_ray.errors import StorageError

BATCH_ROWS = 8192  # decoded at a time: 2-3 MB of captions, however large the row group

# What decoders raise on damaged bytes. A failing store raises StorageError instead, which is none of these: that is retried.
DAMAGE = (pa.ArrowException, OSError, ValueError, EOFError, RecursionError)


def damage_of(error: BaseException, where: str) -> str:
    """What DAMAGE is called in the accounting.

    Raises StorageError where a mounted file system failed (EIO, ESTALE, …) rather than a decoder: it may read again later.
    A decoder's own OSError has no errno; EINVAL is a damaged offset, where no file has bytes.
    """
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        raise StorageError(f"cannot read {where}: {error}") from error
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


@dataclass(frozen=True, slots=True)
class Shard:
    """One input file.

    `root` and `file` open it (`Store(root).open_input(file)`); `path` is its name in row ids, unique in the run. `size` in
    bytes. `content_key` changes with the content, never with a time stamp. `row_groups` are row counts; a text file is one
    group. `error` is empty, or why nothing of this shard can be read (then `rows` is None). `refused`: column -> the Arrow
    extension type for which it is not read.
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
    """How all shards of a run are read: `schema` from `frozen_schema`, `options` of the input's store."""

    schema: pa.Schema
    source: SourceConfig
    filter: FilterConfig
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class UnreadableRange:
    """Rows [start, stop) of a shard that damage keeps from being read."""

    start: int
    stop: int
    error: str


@dataclass(frozen=True, slots=True)
class UnitRows:
    """What rows [start, stop) of a shard gave.

    stop - start = table.num_rows + sum(filtered.values()) + the rows of `unreadable`. `table` has the frozen schema and the
    side column presets.INVALID: null, or what keeps the row from being used ("laion_2b" or "laion_coco": its bytes are not
    UTF-8, shown repaired; "json", "csv" or "tsv": the line cannot be parsed).
    """

    start: int
    stop: int
    table: pa.Table
    filtered: Mapping[FilterReason, int]
    unreadable: tuple[UnreadableRange, ...] = ()


@dataclass(frozen=True, slots=True)
class Decoded:
    """Rows as the file has them, from row `start` on: the file's own column names and types."""

    start: int
    table: pa.Table
    broken: pa.Array | None = None  # strings: null, or the format whose rules the row breaks
