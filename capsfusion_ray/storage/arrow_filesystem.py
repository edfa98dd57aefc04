"""A store as a pyarrow filesystem, to read from: for pyarrow.dataset and the libraries on top of it. Picklable as a Store is.

Reads pass through Store.open_input, so that answers that came short are completed and errors name the URL and the way out.
"""

from __future__ import annotations

from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.fs as pafs

from capsfusion_ray.storage.local import LocalBackend
from capsfusion_ray.storage.store import Store


def arrow_filesystem(store: Store) -> pafs.FileSystem:
    """A filesystem whose paths are relative to the store's root."""
    if isinstance(store.backend, LocalBackend):
        return pafs.SubTreeFileSystem(store.root, pafs.LocalFileSystem())  # reads without a Python file in between
    return pafs.PyFileSystem(_StoreHandler(store))


class _StoreHandler(pafs.FileSystemHandler):
    """Answers pyarrow's calls with those of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _StoreHandler) and self._identity == other._identity

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._store.root)

    def __reduce__(self) -> tuple[type[_StoreHandler], tuple[Store]]:
        return _StoreHandler, (self._store,)

    @property
    def _identity(self) -> tuple[str, dict[str, str]]:
        return self._store.root, self._store.options

    def get_type_name(self) -> str:
        return "capsfusion_ray.Store"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        return [self._info(path) for path in paths]

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        files = self._store.list(selector.base_dir)
        return [pafs.FileInfo(file.path, pafs.FileType.File, size=file.size) for file in files]

    def _info(self, path: str) -> pafs.FileInfo:
        below = self._store.list(path)
        if [file.path for file in below] == [path]:
            return pafs.FileInfo(path, pafs.FileType.File, size=below[0].size)
        return pafs.FileInfo(path, pafs.FileType.Directory if below else pafs.FileType.NotFound)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return self._store.open_input(path)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self._store.open_input(path, sequential=True)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"{self._store.root}: this filesystem only reads; write with Store")

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = delete_file = _refuse
    move = copy_file = open_output_stream = open_append_stream = _refuse
