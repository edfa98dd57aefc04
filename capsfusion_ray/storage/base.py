"""The interface of a kind of store, and what all kinds share: errors, and files that explain their errors."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from capsfusion_ray.errors import StorageError, UsageError


class ClientFaults:
    """Counts this process' requests to a store that failed, by cause. The client repeats most of them by itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._new: Counter[str] = Counter()

    def note(self, cause: str) -> None:
        with self._lock:
            self._new[cause] += 1

    def take(self) -> Counter[str]:
        """Cause (an HTTP status, or an exception's name) -> requests that failed since the last call."""
        with self._lock:
            new, self._new = self._new, Counter()
        return new


FAULTS = ClientFaults()


class StoreRefused(UsageError):
    """The store cannot be used as configured (bucket absent, credentials, no permission, read-only); no retry helps."""


class StoreFull(StorageError):
    """The store has no space left. Nothing waits for that: a person must free some."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One object. `path` is relative to the store's root; `size` in bytes; `etag` is empty where the store has none."""

    path: str
    size: int
    etag: str = ""


class Backend(Protocol):
    """What a kind of store must do. Paths are relative and checked already. Missing objects raise FileNotFoundError."""

    conditional_put: bool

    def list(self, prefix: str) -> Iterator[StoredFile]: ...
    def exists(self, path: str) -> bool: ...
    def get(self, path: str) -> tuple[bytes, str]: ...
    def get_range(self, path: str, start: int, stop: int) -> bytes: ...
    def put(self, path: str, data: bytes) -> str: ...
    def put_if_absent(self, path: str, data: bytes) -> str | None: ...
    def put_if_match(self, path: str, data: bytes, etag: str) -> str | None: ...
    def delete(self, path: str) -> None: ...
    def open_input(self, path: str, sequential: bool) -> Any: ...  # a pyarrow NativeFile or a Python file
    def explain(self, error: Exception, action: str, url: str) -> Exception: ...


class WatchedFile:
    """A file of fsspec that raises our errors; pyarrow's readers pass them on unchanged.

    Without it, a reader could not tell a store that fails (StorageError, retried) from a damaged file (an Arrow or OS error).
    """

    def __init__(self, file: Any, explain: Callable[[Exception], Exception]) -> None:
        self._file = file
        self._explain = explain

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, or all that are left. An answer that is too short is completed: a reader would see a damaged file."""
        try:
            if self._file.size is None:
                return bytes(self._file.read(size))
            left = max(self._file.size - self._file.tell(), 0)
            wanted = left if size < 0 else min(size, left)
            data = bytes(self._file.read(wanted))
            while len(data) < wanted:
                more = bytes(self._file.read(wanted - len(data)))
                if not more:
                    raise OSError(f"only {len(data)} of {wanted} bytes arrived")
                data += more
            return data
        except Exception as error:
            raise self._explain(error) from error

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def size(self) -> int:
        return int(self._file.size)

    def close(self) -> None:
        self._file.close()

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False


def digest(data: bytes) -> str:
    """The etag of stores that have none of their own."""
    return hashlib.sha256(data).hexdigest()


def other_error(error: Exception, action: str, url: str, at: str = "") -> Exception:
    """Our error for an error of the operating system or of a library, with the URL and the way out. `at`: the endpoint."""
    if isinstance(error, FileNotFoundError):
        if action.startswith("write"):
            return StoreRefused(f"{url}: cannot {action} it{at}: this folder cannot be created; choose another one")
        return FileNotFoundError(f"{url}: cannot {action} it{at}: there is no such object")
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EOPNOTSUPP):
        return StoreRefused(
            f"{url}: cannot {action} it{at}: {os.strerror(number)}; choose a folder or bucket in which this user may {action}"
        )
    if number in (errno.ENOTDIR, errno.EISDIR):
        return StoreRefused(
            f"{url}: cannot {action} it{at}: {os.strerror(number)}; a part of the path is a file, or the whole path is a folder; choose another path"
        )
    if number == errno.ENAMETOOLONG:
        return StoreRefused(
            f"{url}: cannot {action} it{at}: {os.strerror(number)}; use a shorter output path or shorter partition values"
        )
    if number in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(
            f"{url}: cannot {action} it{at}: {os.strerror(number)}; free some and run the same command again; it continues"
        )
    if isinstance(error, (ImportError, ValueError)) and "://" in url:
        return StoreRefused(
            f"{url}: fsspec cannot open this kind of URL ({error}); install what it names, or use a folder or s3://"
        )
    return StorageError(f"{url}: cannot {action} it{at}: {type(error).__name__}: {error}")
