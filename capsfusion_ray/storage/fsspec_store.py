"""Any other fsspec URL as a store. It has no conditional writes, so two drivers must not use it at the same time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import fsspec

from capsfusion_ray.storage.base import StoredFile, digest, other_error


class FsspecBackend:
    """Any filesystem of fsspec. Instead of a conditional write it looks and then writes."""

    conditional_put = False

    def __init__(self, root: str, options: Mapping[str, str]) -> None:
        self.fs, self.root = fsspec.core.url_to_fs(root, use_listings_cache=False, **options)

    def _full(self, path: str) -> str:
        return f"{self.root.rstrip('/')}/{path}" if path else self.root

    def list(self, prefix: str) -> Iterator[StoredFile]:
        top = self.root.rstrip("/")
        for full, info in self.fs.find(self._full(prefix), detail=True).items():
            yield StoredFile(full[len(top) :].lstrip("/"), int(info.get("size") or 0), str(info.get("etag") or ""))

    def exists(self, path: str) -> bool:
        return bool(self.fs.isfile(self._full(path)))

    def get(self, path: str) -> tuple[bytes, str]:
        data = bytes(self.fs.cat_file(self._full(path)))
        return data, digest(data)

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        return bytes(self.fs.cat_file(self._full(path), start=start, end=stop))

    def put(self, path: str, data: bytes) -> str:
        try:
            self.fs.pipe_file(self._full(path), data)
        except FileNotFoundError:  # a filesystem with real folders
            self.fs.makedirs(self._full(path).rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(self._full(path), data)
        return digest(data)

    def put_if_absent(self, path: str, data: bytes) -> str | None:
        return self.put(path, data) if not self.exists(path) else None

    def put_if_match(self, path: str, data: bytes, etag: str) -> str | None:
        return self.put(path, data) if self.exists(path) and self.get(path)[1] == etag else None

    def delete(self, path: str) -> None:
        if self.exists(path):
            self.fs.rm_file(self._full(path))

    def open_input(self, path: str, sequential: bool) -> Any:
        return self.fs.open(self._full(path), "rb")

    def explain(self, error: Exception, action: str, url: str) -> Exception:
        return other_error(error, action, url)
