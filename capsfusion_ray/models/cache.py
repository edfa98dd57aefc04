"""A model's folder on this node: where it lies, or fetched under HF_HOME once, under a lock, and checked. Knows no torch.

What `engine.revision` names is what is found here, or nothing: a hub commit, or the content of a folder (see models.py).
HF_HOME may be shared by many nodes, if its file system has locks.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from capsfusion_ray.config import EngineConfig
from capsfusion_ray.errors import ConfigError, EngineError
from capsfusion_ray.models.content import content_files, content_hash
from capsfusion_ray.models.folder_checks import check_folder
from capsfusion_ray.models.location import locate, store_of
from capsfusion_ray.storage import Store, StoredFile, patiently

log = logging.getLogger(__name__)
FOLDER = "capsfusion-models"  # under HF_HOME
SUMS = "SHA256SUMS"  # as sha256sum writes it; where a model's folder has one, whole files are checked
_CHUNK_BYTES = 16 << 20
_FILES_AT_ONCE = 4
_WEIGHTS = (".safetensors", ".bin")
# Other forms of the same weights, and what only other programs read.
_NEVER = ["*/*", "consolidated*", "*.pth", "*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.ckpt"]


def folder_of(engine: EngineConfig, weights: bool = True) -> str:
    """The folder of `engine.model` on this node, which holds `engine.revision`. Without `weights`: its tokenizer and config alone.

    Every loader of a model gets its folder here, so that none has one which `check_folder` refuses.
    Raises ConfigError for a model that is not there, is another one, is refused, or does not fit on the disk; EngineError
    for a copy that does not become whole; StorageError where the store stays away.
    """
    where = locate(engine.model)
    source = store_of(engine)
    if source is None or "://" in where:
        if source is None:
            folder = _from_hub(where, engine.revision, weights)
        else:
            folder = _from_store(where, source, engine, weights)
        check_folder(Store(folder), engine.trust_remote_code)
        return folder
    check_folder(source, engine.trust_remote_code)
    if weights and engine.revision not in ("", found := content_hash(source)):
        raise ConfigError(
            f"engine.model={where}: on {socket.gethostname()} it holds {found}, and this run is of {engine.revision}; every node needs the "
            "same folder, or give the model's URL"
        )
    return source.root


# ---------------------------------------------------------------------------------------------------------- from the hub


def _from_hub(model: str, revision: str, weights: bool) -> str:
    """The hub client has locks of its own, and asks nobody where HF_HUB_OFFLINE=1 or the commit is here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        unwanted = _unwanted_weights(model, revision) if weights else [f"*{suffix}" for suffix in _WEIGHTS]
        return str(snapshot_download(model, revision=revision or None, ignore_patterns=[*_NEVER, *unwanted]))
    except (HFValidationError, EntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"engine.model={model}, commit {revision or 'of main'}: not whole in HF_HOME of {socket.gethostname()}, and the hub does not give "
            f"it ({type(error).__name__}: {str(error).splitlines()[0]}); HF_TOKEN, HF_HOME and HF_HUB_OFFLINE must be those of every node"
        ) from None


def _unwanted_weights(model: str, revision: str) -> list[str]:
    """Many a repository holds its weights twice: where there are safetensors, nothing else is wanted."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json", revision=revision or None)
    names = [path.name for path in Path(config).parent.iterdir()] if isinstance(config, str) else []
    if not any(name.endswith(_WEIGHTS) for name in names):
        try:
            names = HfApi().list_repo_files(model, revision=revision or None)
        except (
            Exception
        ):  # out of reach (each version of the client has its own errors): snapshot_download says what is missing
            return []
    return ["*.bin"] if any(name.endswith(".safetensors") and "/" not in name for name in names) else []


# ---------------------------------------------------------------------------------------------------------- from a store


def _from_store(url: str, source: Store, engine: EngineConfig, weights: bool) -> str:
    if not engine.revision:
        check_folder(source, engine.trust_remote_code)  # before it is read
    cache, content = _cache(), engine.revision or content_hash(source)
    target = cache / (content if weights else f"{content}-without-weights")
    with _locked(target.with_suffix(".lock")):
        if target.is_dir() and (not weights or content_hash(Store(str(target))) == content):
            return str(target)
        if target.is_dir():
            log.warning("%s: it does not hold %s any more; fetched anew", target, content)
            shutil.rmtree(target)
        began = time.monotonic()
        patiently(lambda: check_folder(source, engine.trust_remote_code))  # before it is copied
        size = _fetch(url, source, target, content, weights)
        seconds = max(time.monotonic() - began, 1e-3)
        log.info(
            "fetched %s: %.2f GB in %.0f s (%.0f MB/s), to %s", url, size / 1e9, seconds, size / 1e6 / seconds, target
        )
    return str(target)


def _fetch(url: str, source: Store, target: Path, content: str, weights: bool) -> int:
    """How many bytes it has. What a killed process left of it is gone on with, file by file."""
    files = patiently(lambda: content_files(source))
    if not weights:
        files = [file for file in files if not file.path.endswith(_WEIGHTS)]
    sums = _sums(source)
    partial = target.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    size = sum(file.size for file in files)
    here = sum(path.stat().st_size for path in partial.iterdir())
    if (free := shutil.disk_usage(partial).free) < size - here:
        raise ConfigError(
            f"engine.model={url}: {(size - here) / 1e9:.1f} GB are wanted and {free / 1e9:.1f} GB free at {target.parent} on "
            f"{socket.gethostname()}; set HF_HOME to a larger disk"
        )
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        copied = list(pool.map(lambda file: patiently(lambda: _copy(source, file, partial, sums)), files))
    assert len(copied) == len(files)
    if weights and (found := content_hash(Store(str(partial)))) != content:
        shutil.rmtree(partial)
        now = content_hash(source)
        if now != content:
            raise ConfigError(
                f"engine.model={url}: it holds {now} now, and this run is of {content}; restore the model, or choose a new output.path"
            )
        raise EngineError(
            f"engine.model={url}: the copy at {target} is {found}, the model {content}; its transfer or the disk is damaged"
        )
    partial.rename(target)
    return size


def _copy(source: Store, file: StoredFile, folder: Path, sums: dict[str, str]) -> None:
    """One file, unless it is here; whole under its name or not at all."""
    path = folder / file.path
    if path.exists() and path.stat().st_size == file.size and file.path not in sums:
        return
    digest, unfinished = hashlib.sha256(), path.with_name(f"{path.name}.incomplete")
    with source.open_input(file.path, sequential=True) as stream, unfinished.open("wb") as out:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    if unfinished.stat().st_size != file.size or sums.get(file.path, digest.hexdigest()) != digest.hexdigest():
        got = unfinished.stat().st_size
        unfinished.unlink()
        raise EngineError(
            f"{source.url(file.path)}: {got} of {file.size} bytes came, sha256 {digest.hexdigest()}; not what {SUMS} or the list says"
        )
    unfinished.rename(path)


def _sums(source: Store) -> dict[str, str]:
    found = source.get_with_etag(SUMS)
    lines = [line.split(maxsplit=1) for line in found[0].decode().splitlines()] if found else []
    return {name.lstrip("*").removeprefix("./"): digest for digest, name in (line for line in lines if len(line) == 2)}


def _cache() -> Path:
    from huggingface_hub import constants

    cache = Path(constants.HF_HOME) / FOLDER
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"HF_HOME={constants.HF_HOME}: a fetched model cannot be kept there ({error}); set HF_HOME to a folder of this user"
        ) from None
    return cache


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time, of all nodes that share the folder; a dead one's lock is free."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: another process fetches the model; waiting for it", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise ConfigError(
                f"{path}: its file system has no locks ({error}); set HF_HOME to one that has, such as the node's own disk"
            ) from None
        yield
