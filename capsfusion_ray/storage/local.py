"""A local folder as a store. Knows flock, fsync and links; no network."""

from __future__ import annotations

import fcntl
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from capsfusion_ray.storage.base import StoredFile, digest, other_error

OUR_TEMPORARY = re.compile(
    r"\..+\.[0-9a-f]{32}\.tmp", re.DOTALL
)  # the name of a temporary file that a killed writer leaves


class LocalBackend:
    """A folder. Writes a temporary file, calls fsync, then links it (the first writer wins) or renames it (the last one wins)."""

    conditional_put = True

    def __init__(self, root: str) -> None:
        self.root = Path(root)

    def list(self, prefix: str) -> Iterator[StoredFile]:
        top = self.root / prefix
        if top.is_file():
            yield StoredFile(prefix, top.stat().st_size)
            return
        seen = set()
        for folder, folders, names in os.walk(top, followlinks=True, onerror=_raise_unless_absent):
            if (real := os.path.realpath(folder)) in seen:  # a symbolic link to a folder above: list it once
                folders.clear()
                continue
            seen.add(real)
            for name in names:
                file = Path(folder, name)
                try:
                    size = file.stat().st_size
                except FileNotFoundError:
                    if not file.is_symlink():
                        continue  # deleted since os.walk listed it
                    size = 0  # a link without a target counts as a damaged file, not as an absent one
                yield StoredFile(file.relative_to(self.root).as_posix(), size)

    def exists(self, path: str) -> bool:
        return (self.root / path).is_file()

    def get(self, path: str) -> tuple[bytes, str]:
        data = (self.root / path).read_bytes()
        return data, digest(data)

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        with (self.root / path).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def put(self, path: str, data: bytes) -> str:
        with self._temporary(path, data) as temporary:
            os.replace(temporary, self.root / path)
        return digest(data)

    def put_if_absent(self, path: str, data: bytes) -> str | None:
        with self._temporary(path, data) as temporary:
            try:
                os.link(temporary, self.root / path)
            except FileExistsError:
                try:
                    return digest(data) if self.get(path)[0] == data else None
                except FileNotFoundError:  # deleted meanwhile; another writer was first all the same
                    return None
        return digest(data)

    def put_if_match(self, path: str, data: bytes, etag: str) -> str | None:
        # The kernel releases flock when its holder ends, so a killed driver never leaves the manifest locked.
        if not self.exists(path):
            return None
        with (self.root / path).with_name(f".{Path(path).name}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self.put(path, data) if self.exists(path) and self.get(path)[1] == etag else None

    def delete(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)

    def delete_leftovers(self, older_than_s: float) -> int:
        deleted = 0
        for path in self.root.rglob(".*.tmp"):
            if not OUR_TEMPORARY.fullmatch(path.name):
                continue  # a file of the user, who may keep others in this folder
            try:
                if time.time() - path.stat().st_mtime > older_than_s:
                    path.unlink()
                    deleted += 1
            except FileNotFoundError:
                continue  # its writer has just finished
        return deleted

    def open_input(self, path: str, sequential: bool) -> pa.NativeFile:
        return pa.OSFile(str(self.root / path), "rb")

    def explain(self, error: Exception, action: str, url: str) -> Exception:
        return other_error(error, action, url)

    @contextmanager
    def _temporary(self, path: str, data: bytes) -> Iterator[Path]:
        """A temporary file with `data`, written to disk, in the folder of `path`; its hidden name matches no reader's pattern."""
        final = self.root / path
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")  # OUR_TEMPORARY
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
            folder = os.open(final.parent, os.O_RDONLY)  # the new name must survive a power failure, too
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)


def _raise_unless_absent(error: OSError) -> None:
    """os.walk ignores errors unless told otherwise, and a folder without permission must not look empty."""
    if not isinstance(error, FileNotFoundError):
        raise error
