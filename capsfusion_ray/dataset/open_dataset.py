"""Open a finished output as a pyarrow dataset of exactly the data files that its manifest names. Knows stores; no Ray.

A folder scan would also read files that are no part of the dataset: those of another program, or of an edit that is
being written at this moment. The manifest is exact at every moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs as pafs

from capsfusion_ray.core.columns import type_of_name
from capsfusion_ray.core.parquet import read_schema
from capsfusion_ray.dataset.data_files import data_schema
from capsfusion_ray.dataset.layout import DATA_DIR, DATA_FOLDERS
from capsfusion_ray.dataset.manifest import FileEntry, read_finished
from capsfusion_ray.dataset.partitions import BY_SHARD, value_of
from capsfusion_ray.dataset.plan_files import read_plans
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.storage import Store, arrow_filesystem

_READERS = 16  # a footer has a few kB: its time is the store's latency


@dataclass(frozen=True)
class DatasetFiles:
    """The data files of one kind of a finished output.

    `paths`: in `filesystem`, in the manifest's order; empty where the output has no row of this kind. `rows`: of all files together.
    `schema`: of the dataset, the partition's column last. `partition`: path -> value of that column; empty for
    output.partition_by=shard, which is no column of the rows.
    """

    filesystem: pafs.FileSystem
    paths: tuple[str, ...]
    rows: int
    schema: pa.Schema
    partition: Mapping[str, pa.Scalar] = field(default_factory=dict)


def list_files(path: str, storage: Mapping[str, str] | None = None, kind: str = DATA_DIR) -> DatasetFiles:
    """The data files that the manifest of the output at `path` names.

    `path`: the output.path of a fuse command, a folder or a URL. `storage`: its output.storage (fsspec options). `kind`: "data" or
    "rejected". Raises ConfigError for an output that is not finished.
    """
    if kind not in DATA_FOLDERS:
        raise ConfigError(f"kind={kind}: there is no such kind of rows; choose one of {', '.join(DATA_FOLDERS)}")
    store = Store(path, storage)
    manifest = read_finished(store, "open_dataset")
    fields = read_plans(store)[0].fields
    by = str(manifest.base.get("output.partition_by", BY_SHARD))
    schema = data_schema(fields, kind, by)
    files = [file for file in manifest.files if file.kind == kind]
    _refuse_foreign_types(store, files)
    partition: dict[str, pa.Scalar] = {}
    if by != BY_SHARD:
        type_ = type_of_name(dict(fields)[by])
        schema = schema.append(pa.field(by, type_))
        partition = {file.path: pa.scalar(value_of(file.path), pa.string()).cast(type_) for file in files}
    paths, rows = tuple(file.path for file in files), sum(file.rows for file in files)
    return DatasetFiles(arrow_filesystem(store), paths, rows, schema, partition)


def _refuse_foreign_types(store: Store, files: Sequence[FileEntry]) -> None:
    """Raises ForeignType where a column has an Arrow extension type: pyarrow.dataset would run code to read it."""

    def check(file: FileEntry) -> None:
        with store.open_input(file.path) as source:
            read_schema(source, store.url(file.path))

    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(check, files))


def open_dataset(path: str, storage: Mapping[str, str] | None = None, kind: str = DATA_DIR) -> ds.Dataset:
    """A `pyarrow.dataset.Dataset` of exactly the data files that the manifest names; arguments and errors as for list_files.

    Its schema is fixed by the plan. With output.partition_by=<column> that column is part of it, with the type that it had in the
    input; rows of the null partition have null.
    """
    return open_files(list_files(path, storage, kind))


def open_files(files: DatasetFiles) -> ds.Dataset:
    """The `pyarrow.dataset.Dataset` of files that `list_files` has found."""
    by = files.schema.names[-1] if files.partition else ""
    expressions = [_equals(by, files.partition[file]) if by else pc.scalar(True) for file in files.paths]
    return ds.FileSystemDataset.from_paths(
        list(files.paths), files.schema, ds.ParquetFileFormat(), files.filesystem, partitions=expressions
    )


def _equals(column: str, value: pa.Scalar) -> pc.Expression:
    """What holds for every row of a file: pyarrow fills the column from it."""
    return pc.field(column) == value if value.is_valid else pc.field(column).is_null()
