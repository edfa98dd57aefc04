"""Data files that are missing or hold other bytes than the manifest says: found, and not passed on. Knows the store."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from capsfusion_ray.dataset.manifest import FileEntry
from capsfusion_ray.errors import AccountingError
from capsfusion_ray.storage import Store

WAY_OUT = "the fuse command with repair=true recomputes its units"
_READERS = 8


def checksum_problem(file: FileEntry, data: bytes) -> str:
    """How the checksum of `data` differs from the manifest's; empty where it does not."""
    digest = hashlib.sha256(data).hexdigest()
    return "" if digest == file.sha256 else f"checksum {digest[:12]}…, the manifest says {file.sha256[:12]}…"


def read_intact(store: Store, file: FileEntry) -> bytes:
    """A data file's bytes. Raises AccountingError for damaged ones: written to a new file, they would get a new checksum."""
    data = store.get(file.path)
    if wrong := checksum_problem(file, data):
        raise AccountingError(f"{store.url(file.path)}: damaged ({wrong}); {WAY_OUT}")
    return data


def read_if_there(store: Store, file: FileEntry) -> bytes | None:
    """A data file's bytes, checked for nothing; None where it is missing."""
    try:
        return store.get(file.path)
    except FileNotFoundError:
        return None


def damage(store: Store, files: Sequence[FileEntry]) -> dict[str, str]:
    """Path -> what is wrong, of every file that is missing or holds other bytes than the manifest says. Reads all files."""

    def wrong(file: FileEntry) -> str:
        data = read_if_there(store, file)
        return "missing" if data is None else checksum_problem(file, data)

    with ThreadPoolExecutor(_READERS) as pool:
        return {file.path: what for file, what in zip(files, pool.map(wrong, files), strict=True) if what}


def refuse_damage(store: Store, files: Sequence[FileEntry], what: str) -> None:
    """Raises AccountingError where one of `files` is damaged. `what`: the edit that would write their rows to new files."""
    found = damage(store, files)
    if found:
        path, wrong = next(iter(found.items()))
        raise AccountingError(
            f"{store.root}: {len(found)} files are damaged (first {path}: {wrong}), and {what} would copy the damage into "
            f"new files; {WAY_OUT}"
        )
