"""Refuse a model folder with which a loader would run code, read a file outside of the folder, or load half a model.

Model folders come from strangers. What is refused here was tried with transformers and vLLM: tests/engines/test_hostile_models.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capsfusion_ray.errors import ConfigError
from capsfusion_ray.models.json_object import parse_json_object
from capsfusion_ray.storage import Store

_ADAPTERS = ("adapter_config.json", "adapter_model")
_INDEXES = (".safetensors.index.json", ".bin.index.json")
_SETTINGS = "config.json"  # config.json itself, generation_config.json, tokenizer_config.json, …
_TABLES = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
_MAX_DEPTH = 32  # of nested objects and lists; a config with nested configs has 5 levels
# Values that load nothing. Under any other name transformers fetches a kernel from the hub and runs it; null lets
# transformers choose one of these.
_SAFE_KERNELS = {
    "attn_implementation": (None, "eager", "sdpa", "flex_attention"),
    "experts_implementation": (None, "eager", "grouped_mm", "batched_mm"),
}
_CODE_SETTINGS = ("use_kernels", "kernel_config", "custom_generate", "trust_remote_code")
# transformers looks this name up among all its classes, and loads one even if it is not a tokenizer.
_TOKENIZER_CLASS = re.compile(r"(?!Auto)\w*(Tokenizer\w*|Backend)")


def check_folder(folder: Store, trust_remote_code: bool) -> None:
    """Raises ConfigError for a folder with which a loader would run code, read a file outside of it, or load half a model.

    Looks at names, links and small files; reads no weights. Code named by `auto_map` or in custom_generate/ is not refused
    here: transformers and vLLM refuse it themselves without trust_remote_code, and many models that name it load without it.
    """
    if "://" not in folder.root:
        _check_links(Path(os.path.realpath(folder.root)))
    names = [file.path for file in folder.list() if "/" not in file.path]
    if adapter := next((name for name in names if name.startswith(_ADAPTERS)), None):
        raise ConfigError(
            f"{folder.url(adapter)}: adapters are not supported yet, and the base model alone writes other captions; merge "
            "the adapter first (merge_and_unload of peft), and give the folder of the merged model"
        )
    for name in names:
        if name.endswith((*_INDEXES, _SETTINGS)) or name in _TABLES:
            path = folder.url(name)
            content = parse_json_object(path, folder.get(name))
            if name.endswith(_INDEXES):
                _check_index(path, content)
            elif name not in _TABLES:
                for where, key, value in _entries(path, content):
                    _check_setting(f"{path}: {where}{key}={value!r:.80}", key, value, trust_remote_code)


def _check_links(top: Path) -> None:
    """Raises ConfigError for a link that leads out of the folder, and for anything but files and folders.

    A snapshot of the hub's cache may link to the blobs of the same model.
    """
    blobs = top.parent.parent / "blobs" if top.parent.name == "snapshots" else None
    for folder, folders, names in os.walk(top):  # does not follow links
        for path in (Path(folder, name) for name in folders + names):
            target = Path(os.path.realpath(path))
            if path.is_symlink() and not target.is_relative_to(top) and target.parent != blobs:
                raise ConfigError(
                    f"{path}: a link out of the model's folder, to {target}; replace it with the file, or remove it"
                )
            if target.exists() and not target.is_file() and not target.is_dir():
                raise ConfigError(f"{path}: neither a file nor a folder (a pipe, a socket or a device); remove it")


def _check_index(path: str, content: dict[str, Any]) -> None:
    """Raises ConfigError if an index of weights names a file outside of the folder."""
    files, kind = content.get("weight_map"), Path(path.removesuffix(".index.json")).suffix
    if not isinstance(files, dict) or not isinstance(content.get("metadata", {}), dict):
        raise ConfigError(f"{path}: weight_map and metadata must be objects; fetch the model again")
    for weight, file in files.items():
        if not _in_the_folder(file) or not file.endswith(kind):
            raise ConfigError(
                f"{path}: {weight}={file!r:.200}: no {kind} file of this folder; mend the index, or use another model"
            )


def _in_the_folder(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _check_setting(shown: str, key: str, value: Any, trust_remote_code: bool) -> None:
    """Raises ConfigError for a setting that leads out of the folder or asks for code. `shown`: the setting and its place, for errors."""
    files = value if isinstance(value, list) else [] if value is None else [value]
    is_file = (
        key.endswith(("_file", "_files")) and key != "special_tokens_map_file"
    )  # transformers never opens that one
    if (is_file or key == "transformers_weights") and not all(map(_in_the_folder, files)):
        raise ConfigError(f"{shown}: no file of this folder; remove the setting")
    if key == "init_inputs" and value:
        raise ConfigError(f"{shown}: transformers would load these as files of the tokenizer; remove the setting")
    if key == "speculators_config" and value:
        raise ConfigError(f"{shown}: vLLM would load the model that it names; give that model, or remove the setting")
    if key == "tokenizer_class" and value is not None and not _TOKENIZER_CLASS.fullmatch(str(value)):
        raise ConfigError(f"{shown}: not the class of a tokenizer; remove the setting")
    if trust_remote_code:
        return
    public = key.removeprefix("_").removesuffix("_internal")
    asked = list(value.values()) if isinstance(value, dict) else [value]
    if not all(one in _SAFE_KERNELS.get(public, asked) for one in asked) or (key in _CODE_SETTINGS and value):
        raise ConfigError(
            f"{shown}: would run code from outside of the folder; remove the setting, or give engine.trust_remote_code=true"
        )


def _entries(path: str, content: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(place, key, value) of each entry, including those of nested objects and lists."""
    todo: list[tuple[str, Any, int]] = [("", content, 1)]
    while todo:
        where, held, depth = todo.pop()
        if depth > _MAX_DEPTH:
            raise ConfigError(f"{path}: more than {_MAX_DEPTH} nested objects or lists; fetch the model again")
        for key, value in held.items() if isinstance(held, dict) else enumerate(held):
            yield where, str(key), value
            if isinstance(value, (dict, list)):
                todo.append((f"{where}{key}.", value, depth + 1))
