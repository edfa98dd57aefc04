"""One store: picks the backend by the URL, checks paths, and turns every backend's errors into ours.

A commit is `put_if_absent`: one object, one PUT, whole or not at all.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa

from capsfusion_ray.config import is_secret
from capsfusion_ray.errors import StorageError, UsageError
from capsfusion_ray.storage.base import Backend, StoredFile, StoreRefused, WatchedFile, other_error
from capsfusion_ray.storage.local import LocalBackend

# Objects are deleted one by one: older radosgw wants Content-MD5 for bulk DeleteObjects, and new botocore leaves it out.
DELETE_THREADS = 16
LEFTOVER_AGE_S = 3600.0  # no write of ours lasts an hour, so an older temporary file belongs to a dead process

T = TypeVar("T")
Files = list[StoredFile]  # inside Store, `list` is the method


class Store:
    """The objects under one root. Picklable: it connects on first use, in the process that uses it.

    `root`: a folder or a URL. `options`: fsspec options; for s3:// the keys of S3_OPTIONS. All methods take paths relative to
    the root with "/" between the parts. They raise StoreRefused, StorageError, or FileNotFoundError for a missing object.
    """

    def __init__(self, root: str, options: Mapping[str, str] | None = None) -> None:
        if not root:
            raise StoreRefused("the path of a store is empty; give a folder or a URL such as s3://bucket/folder")
        self.root = _normal_root(root)
        self.options = dict(options or {})
        self._backend: Backend | None = None
        self._connecting = threading.Lock()

    def __repr__(self) -> str:
        shown = {k: "***" if is_secret(k) else v for k, v in self.options.items()}
        return f"Store({self.root!r}, {shown})"

    def __reduce__(self) -> tuple[type[Store], tuple[str, dict[str, str]]]:
        return Store, (self.root, self.options)

    @property
    def backend(self) -> Backend:
        if self._backend is None:
            with self._connecting:  # only one of many threads connects: each S3 client costs a second of CPU
                if self._backend is None:
                    self._backend = _connect(self.root, self.options)
        return self._backend

    @property
    def conditional_put(self) -> bool:
        """False for stores other than a local folder or S3: put_if_absent looks and then writes, so two writers may both win."""
        return self.backend.conditional_put

    def url(self, path: str) -> str:
        """The whole URL of an object, for messages."""
        return f"{self.root.rstrip('/')}/{path}" if path else self.root

    def list(self, prefix: str = "") -> Files:
        """Every object under the folder `prefix`, recursively, sorted by path. An absent folder is empty.

        Names and folders that start with "." are left out: they are temporary files, or files of other programs.
        """

        def found() -> Files:
            return sorted(self.backend.list(_checked(prefix)), key=lambda file: file.path)

        files = self._call("list", prefix, found)
        return [f for f in files if not any(part.startswith(".") for part in f.path.split("/"))]

    def exists(self, path: str) -> bool:
        return self._call("look for", path, lambda: self.backend.exists(_checked(path)))

    def get(self, path: str) -> bytes:
        return self._call("read", path, lambda: self.backend.get(_checked(path))[0])

    def get_with_etag(self, path: str) -> tuple[bytes, str] | None:
        """The bytes and the etag that belong together, for `put_if_match`; None where there is no such object."""
        try:
            return self._call("read", path, lambda: self.backend.get(_checked(path)))
        except FileNotFoundError:
            return None

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object that no one replaces meanwhile: one request, where `open_input` makes two or more."""

        def read() -> bytes:
            data = self.backend.get_range(_checked(path), start, stop) if start < stop else b""
            if len(data) != stop - start:
                raise OSError(f"{len(data)} of the {stop - start} bytes from {start} on came")
            return data

        return self._call("read", path, read)

    def put(self, path: str, data: bytes) -> None:
        """Write or replace. Readers see all of the old bytes or all of the new ones."""
        self._call("write", path, lambda: self.backend.put(_checked(path), data))

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write unless the object exists. True: it holds `data` now, written by us or by another writer of the same bytes."""
        return self._call("write", path, lambda: self.backend.put_if_absent(_checked(path), data)) is not None

    def put_if_match(self, path: str, data: bytes, etag: str | None) -> str | None:
        """Compare and swap: write if the object has `etag` (None: if it is absent). The new etag; None where it was not written.

        Equal bytes that another writer put there a moment before count as ours, because a PUT whose answer was lost looks
        the same. Where it matters which writer won, the bytes must contain the writer's name.
        """
        if etag is None:
            return self._call("write", path, lambda: self.backend.put_if_absent(_checked(path), data))
        return self._call("write", path, lambda: self.backend.put_if_match(_checked(path), data, etag))

    def delete(self, paths: Iterable[str]) -> None:
        """Delete each path; a path that does not exist is no error."""
        with ThreadPoolExecutor(DELETE_THREADS) as pool:
            for _ in pool.map(lambda p: self._call("delete", p, lambda: self.backend.delete(_checked(p))), paths):
                pass

    def delete_leftovers(self, older_than_s: float = LEFTOVER_AGE_S) -> int:
        """Delete the temporary files of killed writers in a local folder, which may hold captions; how many there were."""
        if not isinstance(self.backend, LocalBackend):
            return 0
        return self.backend.delete_leftovers(older_than_s)

    def open_input(self, path: str, sequential: bool = False) -> pa.NativeFile:
        """A seekable file for pyarrow. `sequential`: the caller reads it from start to end, so read ahead in large blocks."""
        file = self._call("open", path, lambda: self.backend.open_input(_checked(path), sequential))
        if isinstance(file, pa.NativeFile):
            return file
        return pa.PythonFile(WatchedFile(file, lambda error: self._explained("read", path, error)), mode="r")

    def check_writable(self, folder: str) -> None:
        """Test in seconds that objects can be written, swapped and deleted in `folder`. Raises StoreRefused where they cannot.

        Finds stores that ignore or misunderstand `If-None-Match` (two drivers would overwrite each other's commits) or
        `If-Match` (no driver could keep its lease).
        """
        path = f"{folder}/probe-{uuid.uuid4().hex}" if folder else f"probe-{uuid.uuid4().hex}"
        # Outside of the try: where the first write fails, an error of the deletion would hide the reason.
        first = self.put_if_match(path, b"1", None)
        try:
            kept = first is not None and not self.put_if_absent(path, b"2")
            swapped = first is not None and self.put_if_match(path, b"3", first) is not None
            swaps = swapped and self.put_if_match(path, b"4", first) is None
        finally:
            self.delete([path])
        for condition, holds in (("If-None-Match", kept), ("If-Match", swaps)):
            if self.conditional_put and not holds:
                raise StoreRefused(
                    f"{self.url(path)}: the store does not follow the condition {condition} of a write; use a store that has conditional writes"
                )

    def _call(self, action: str, path: str, work: Callable[[], T]) -> T:
        try:
            return work()
        except (UsageError, StorageError):
            raise
        except Exception as error:  # each backend has its own exceptions, and Backend.explain turns them into ours
            raise self._explained(action, path, error) from error

    def _explained(self, action: str, path: str, error: Exception) -> Exception:
        explain = self._backend.explain if self._backend else other_error
        explained = explain(error, action, self.url(path))
        return type(explained)(self._without_secrets(str(explained)))

    def _without_secrets(self, text: str) -> str:
        for name, value in self.options.items():
            text = text.replace(value, "***") if value and is_secret(name) else text
        return text


def _connect(root: str, options: Mapping[str, str]) -> Backend:
    if "://" not in root:
        return LocalBackend(root)
    # Imported here: s3fs and fsspec cost half a second, and a local run does not need them.
    if root.startswith("s3://"):
        from capsfusion_ray.storage.s3 import S3Backend

        return S3Backend(root, options)
    from capsfusion_ray.storage.fsspec_store import FsspecBackend

    return FsspecBackend(root, options)


def _normal_root(root: str) -> str:
    """Local roots become absolute, because Ray workers have another working folder. URLs lose a slash at their end."""
    for scheme in ("s3a://", "s3n://"):
        root = "s3://" + root.removeprefix(scheme) if root.startswith(scheme) else root
    if "://" in root and not root.startswith(("file://", "local://")):
        if root.startswith("s3://") and not root.removeprefix("s3://").strip("/"):
            raise StoreRefused(f"{root}: the URL has no bucket; write s3://bucket/folder")
        return root.rstrip("/") if not root.endswith("://") else root
    return os.path.abspath(os.path.expanduser(root.removeprefix("file://").removeprefix("local://")))


def _checked(path: str) -> str:
    path = path.strip("/")
    if any(part in ("..", ".") or not part for part in path.split("/") if path):
        raise StoreRefused(f"{path!r}: a path inside the store must not contain '.', '..' or empty parts")
    return path
