"""A finished output as a dataset: for pyarrow, Ray Data and the Hugging Face `datasets`. Knows no Ray until `to_ray`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import fspath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from capsfusion_ray.api.settings import Place
from capsfusion_ray.config.extras import imports_of
from capsfusion_ray.dataset import open_dataset as data


class Dataset:
    """Exactly the rows that the manifest of an output names, whatever else is in its folder. Made by `open_dataset`.

    A column that the output is partitioned by is a column like the others.
    """

    def __init__(self, path: str, storage: Mapping[str, str] | None = None, kind: str = "data") -> None:
        self.path, self.kind = path, kind
        self._files = data.list_files(path, storage, kind)
        self._dataset = data.open_files(self._files)

    @property
    def files(self) -> list[str]:
        """The Parquet files, relative to `path`, in the order of the manifest."""
        return list(self._files.paths)

    @property
    def schema(self) -> pa.Schema:
        """The columns and their types, which are the same in each file."""
        return self._files.schema

    def __len__(self) -> int:
        """The number of rows, as the manifest counts them."""
        return self._files.rows

    def __repr__(self) -> str:
        return f"<{self.kind} of {self.path}: {len(self):,} rows, {len(self.files)} files>"

    def to_arrow(self) -> pads.Dataset:
        """A pyarrow.dataset.Dataset, to scan with column and row filters."""
        return self._dataset

    def to_table(self, columns: Sequence[str] | None = None, filter: pc.Expression | None = None) -> pa.Table:
        """The rows in memory.

        Args:
            columns: only these; None: all.
            filter: only rows for which it holds, such as pyarrow.compute.field("punsafe") < 0.3.
        """
        names = self.schema.names if columns is None else list(columns)
        return self._dataset.to_table(columns=names, filter=filter)

    def to_ray(self, columns: Sequence[str] | None = None) -> Any:
        """A ray.data.Dataset, read file by file by the tasks of the cluster."""
        from capsfusion_ray.run.read_output import ray_dataset

        return ray_dataset(self._files, None if columns is None else list(columns))

    def to_hf(self, columns: Sequence[str] | None = None) -> Any:
        """A datasets.Dataset in memory. Raises ConfigError without the extra `hub`.

        For an output that is larger than the memory: cf.export it, and let `datasets` load that folder.
        """
        with imports_of("hub"):
            import datasets
        return datasets.Dataset(self.to_table(columns))


def open_dataset(path: Place, *, storage: Mapping[str, str] | None = None, kind: str = "data") -> Dataset:
    """Open a finished output.

    Args:
        path: the folder or URL of the output (output.path).
        storage: fsspec options of its store (output.storage).
        kind: "data" for fused and kept rows, or "rejected".

    Raises:
        ConfigError: there is no finished output, or no such kind.
    """
    return Dataset(fspath(path), storage, kind)
