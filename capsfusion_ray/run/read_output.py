"""A finished output as a Ray dataset of exactly the files that its manifest names."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import ray.data

from capsfusion_ray.dataset.open_dataset import DatasetFiles


def ray_dataset(files: DatasetFiles, columns: Sequence[str] | None = None) -> ray.data.Dataset:
    """The rows of `files`, of these columns (None: all), read by one or more tasks per file.

    A partition column is not in the files: each value has its files, and gets the column when they are read.
    """
    names = list(files.schema.names if columns is None else columns)
    partition = files.schema.names[-1] if files.partition else ""
    if not files.paths:
        return ray.data.from_arrow(files.schema.empty_table().select(names))
    if not partition or partition not in names:
        return _read(files, list(files.paths), names)
    by_value: dict[pa.Scalar, list[str]] = {}
    for path in files.paths:
        by_value.setdefault(files.partition[path], []).append(path)
    type_ = files.schema.field(partition).type
    inside = [name for name in names if name != partition]
    parts = [
        _read(files, paths, inside).map_batches(
            _with_column,
            batch_format="pyarrow",
            fn_kwargs={"name": partition, "value": value.as_py(), "type_": type_, "order": names},
        )
        for value, paths in by_value.items()
    ]
    return parts[0].union(*parts[1:])


def _read(files: DatasetFiles, paths: list[str], columns: list[str]) -> ray.data.Dataset:
    return ray.data.read_parquet(paths, filesystem=files.filesystem, columns=columns, partitioning=None)


def _with_column(batch: pa.Table, name: str, value: object, type_: pa.DataType, order: list[str]) -> pa.Table:
    column = pa.array([value] * batch.num_rows, type_)
    return batch.append_column(pa.field(name, type_), column).select(order)
