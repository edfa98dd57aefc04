"""Hash the files of a model folder, so that two models of one name can be told apart."""

from __future__ import annotations

import hashlib

from capsfusion_ray.storage import Store, StoredFile

_SAMPLE_BYTES = 1 << 20
_WHOLE_BYTES = 64 << 20  # larger files are sampled at five places, because hashing 26 GB takes a minute
_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py")


def content_files(folder: Store) -> list[StoredFile]:
    """The files that decide what the model writes. README files and subfolders do not."""
    return [file for file in folder.list() if "/" not in file.path and file.path.endswith(_SUFFIXES)]


def content_hash(folder: Store) -> str:
    """16 hex digits of the names, sizes and bytes of `content_files`.

    Times are left out, so that a folder on disk and its copy in a bucket have the same hash.
    """
    digest = hashlib.sha256()
    for file in content_files(folder):
        digest.update(f"{file.path}\0{file.size}\0".encode())
        with folder.open_input(file.path) as stream:
            if file.size <= _WHOLE_BYTES:
                digest.update(stream.read())
            else:
                for i in range(5):
                    stream.seek((file.size - _SAMPLE_BYTES) * i // 4)
                    digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
