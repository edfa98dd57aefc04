"""A local folder as a store. Knows flock, fsync and links; no network."""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from capsfusion_ray.storage.base import StoredFile, digest, other_error


class LocalBackend:
    """A folder. Temporary name, fsync, then one atomic link (first wins) or rename (last wins)."""

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
            if (real := os.path.realpath(folder)) in seen:  # a link to a folder above: walk it once
                folders.clear()
                continue
            seen.add(real)
            for name in names:
                file = Path(folder, name)
                try:
                    size = file.stat().st_size
                except FileNotFoundError:
                    if not file.is_symlink():
                        continue  # deleted since the listing
                    size = 0  # a dangling link is a damaged file, not an absent one
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
                except FileNotFoundError:  # deleted since: it was there first all the same
                    return None
        return digest(data)

    def put_if_match(self, path: str, data: bytes, etag: str) -> str | None:
        # flock: released by the kernel when its holder dies, so a killed driver never leaves the manifest locked
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
            try:
                if time.time() - path.stat().st_mtime > older_than_s:
                    path.unlink()
                    deleted += 1
            except FileNotFoundError:
                continue  # its writer lives, and has just finished
        return deleted

    def open_input(self, path: str, sequential: bool) -> pa.NativeFile:
        return pa.OSFile(str(self.root / path), "rb")

    def explain(self, error: Exception, action: str, url: str) -> Exception:
        return other_error(error, action, url)

    @contextmanager
    def _temporary(self, path: str, data: bytes) -> Iterator[Path]:
        """`data`, safe on disk, under a hidden name that no reader's glob matches, in the folder of `path`."""
        final = self.root / path
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
            folder = os.open(final.parent, os.O_RDONLY)  # the new name itself must survive a power cut too
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)


def _raise_unless_absent(error: OSError) -> None:
    """os.walk hides errors; a folder without permission must not look empty."""
    if not isinstance(error, FileNotFoundError):
        raise error
