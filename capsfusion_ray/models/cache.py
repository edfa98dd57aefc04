"""Give the folder of a model on this node. A model of a store or the hub is fetched once, under a lock, into HF_HOME. Knows no torch.

The folder has exactly the model of `engine.revision`: a hub commit or a content hash (models/content.py). Many nodes may share one
HF_HOME if its file system has locks.
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
SUMS = "SHA256SUMS"  # in the format of sha256sum; if a model's folder has one, whole files are checked
_CHUNK_BYTES = 16 << 20
_FILES_AT_ONCE = 4
_WEIGHTS = (".safetensors", ".bin")
# Other formats of the same weights, and files that only other programs read.
_NEVER = ["*/*", "consolidated*", "*.pth", "*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.ckpt"]


def folder_of(engine: EngineConfig, weights: bool = True) -> str:
    """The folder of `engine.model` on this node, with the content of `engine.revision`. Without `weights`: only tokenizer and config.

    Every loader of a model gets its folder from here, so that none loads a folder that `check_folder` refuses. Raises ConfigError
    for a model that does not exist, has other content, is refused, or does not fit on the disk; EngineError for a copy that cannot
    be completed; StorageError if the store fails.
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
            f"engine.model={where}: on {socket.gethostname()} it holds {found}, and this run is of {engine.revision}; put the same "
            "folder on every node, or give the model's URL"
        )
    return source.root


# ---------------------------------------------------------------------------------------------------------- from the hub


def _from_hub(model: str, revision: str, weights: bool) -> str:
    """The folder in the hub's cache. Its client has its own locks, and makes no request if HF_HUB_OFFLINE=1 or the commit is here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        unwanted = _unwanted_weights(model, revision) if weights else [f"*{suffix}" for suffix in _WEIGHTS]
        return str(snapshot_download(model, revision=revision or None, ignore_patterns=[*_NEVER, *unwanted]))
    except (HFValidationError, EntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"engine.model={model}, commit {revision or 'of main'}: not complete in HF_HOME of {socket.gethostname()}, and the hub does not give "
            f"it ({type(error).__name__}: {str(error).splitlines()[0]}); HF_TOKEN, HF_HOME and HF_HUB_OFFLINE must be those of every node"
        ) from None


def _unwanted_weights(model: str, revision: str) -> list[str]:
    """Patterns of weights not to fetch: many repositories hold the weights twice, and the safetensors are enough."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json", revision=revision or None)
    names = [path.name for path in Path(config).parent.iterdir()] if isinstance(config, str) else []
    if not any(name.endswith(_WEIGHTS) for name in names):
        try:
            names = HfApi().list_repo_files(model, revision=revision or None)
        except Exception:  # the hub cannot be reached (the errors differ between versions of the client): snapshot_download names what is missing
            return []
    return ["*.bin"] if any(name.endswith(".safetensors") and "/" not in name for name in names) else []


# ---------------------------------------------------------------------------------------------------------- from a store


def _from_store(url: str, source: Store, engine: EngineConfig, weights: bool) -> str:
    if not engine.revision:
        check_folder(source, engine.trust_remote_code)  # before any file is read
    cache, content = _cache(), engine.revision or content_hash(source)
    target = cache / (content if weights else f"{content}-without-weights")
    with _locked(target.with_suffix(".lock")):
        if target.is_dir() and (not weights or content_hash(Store(str(target))) == content):
            return str(target)
        if target.is_dir():
            log.warning("%s: it no longer holds %s; fetching it again", target, content)
            shutil.rmtree(target)
        began = time.monotonic()
        patiently(lambda: check_folder(source, engine.trust_remote_code))  # before any file is copied
        size = _fetch(url, source, target, content, weights)
        seconds = max(time.monotonic() - began, 1e-3)
        log.info(
            "fetched %s: %.2f GB in %.0f s (%.0f MB/s), to %s", url, size / 1e9, seconds, size / 1e6 / seconds, target
        )
    return str(target)


def _fetch(url: str, source: Store, target: Path, content: str, weights: bool) -> int:
    """Copy the model into `target`; its size in bytes. Files that a killed process copied completely are kept."""
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
            f"engine.model={url}: {(size - here) / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free at {target.parent} on "
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
            f"engine.model={url}: the copy at {target} is {found}, the model {content}; the transfer or the disk is damaged"
        )
    partial.rename(target)
    return size


def _copy(source: Store, file: StoredFile, folder: Path, sums: dict[str, str]) -> None:
    """Copy one file unless it is here. It gets its name only when it is complete."""
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
            f"{source.url(file.path)}: {got} of {file.size} bytes arrived, sha256 {digest.hexdigest()}; {SUMS} or the listing of the store has another value"
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
            f"HF_HOME={constants.HF_HOME}: a fetched model cannot be stored there ({error}); set HF_HOME to a folder that this user can write"
        ) from None
    return cache


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock among all processes of all nodes that share the folder. The lock of a dead process is released."""
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
