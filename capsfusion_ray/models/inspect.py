"""Which prompt and decoding a model wants, what tells its content, and what its folder may not do (`check_folder`).

Loads no weights, fetches none; knows no torch.

A fusion model is a Hugging Face model folder, here, in a store or on the hub, that may carry a `fusion.json`:
{"prompt_template": "… {raw} … {synthetic} …", "max_prompt_tokens": 256,
 "decode": {"scoring": "transformers", "length_penalty": 1.5, "no_repeat_ngram": 5}}.
Without one it is prompted with CapsFusion's own text, to the letter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capsfusion_ray.config import DecodeConfig, EngineConfig, SettledDecode
from capsfusion_ray.config.bundled import bundled
from capsfusion_ray.core.prompt import TEMPLATE, Template
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.storage import Store, StoredFile

log = logging.getLogger(__name__)
EMBEDDED = "capsfusion-tiny"
FUSION_FILE = "fusion.json"
# What a model folder may say of decoding.
WISHES: dict[str, tuple[type, ...]] = {"scoring": (str,), "length_penalty": (int, float), "no_repeat_ngram": (int,)}
_SAMPLE_BYTES = 1 << 20
_WHOLE_BYTES = 64 << 20  # larger weight files are sampled at five places: 26 GB would take a minute to hash
_CONTENT_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py")
_HUB = "hub:"
_ADAPTERS = ("adapter_config.json", "adapter_model")
_INDEXES = (".safetensors.index.json", ".bin.index.json")
_SETTINGS = "config.json"  # config.json itself, generation_config.json, tokenizer_config.json, …
_TABLES = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
_DEEPEST = 32  # a config of configs has 5 levels
# Any other name is a kernel that transformers fetches from the hub and runs; null lets it choose one of these.
_OWN_KERNELS = {
    "attn_implementation": (None, "eager", "sdpa", "flex_attention"),
    "experts_implementation": (None, "eager", "grouped_mm", "batched_mm"),
}
_ASKS_FOR_CODE = ("use_kernels", "kernel_config", "custom_generate", "trust_remote_code")
# transformers looks this class up by name among all that it has, and loads one that is no tokenizer all the same.
_TOKENIZER_CLASS = re.compile(r"(?!Auto)\w*(Tokenizer\w*|Backend)")


@dataclass(frozen=True)
class ModelInfo:
    """What the run must know of a model before any weights are loaded."""

    template: str
    content: str  # hash of the folder's files, or hub:<commit>; part of the base fingerprint
    embedded: bool
    max_prompt_tokens: int | None
    decode: dict[str, Any]

    @property
    def revision(self) -> str:
        """What every node must find under the model's name: the hub's commit, or the content of the folder."""
        return self.content.removeprefix(_HUB)


def embedded_path() -> Path:
    """The folder of the demo model that comes with the package."""
    return bundled(f"models/{EMBEDDED}")


def locate(model: str) -> str:
    """`engine.model`, and for an empty one the embedded model's folder."""
    return model or str(embedded_path())


def store_of(engine: EngineConfig) -> Store | None:
    """The folder of `engine.model`, wherever it lies; None for a hub id. Raises ConfigError for a folder that is not there."""
    where = locate(engine.model)
    if "://" in where:
        return Store(where, engine.storage)
    if Path(where).expanduser().is_dir():
        return Store(where)
    if where.startswith((".", "/", "~")) or where.count("/") > 1:
        raise ConfigError(
            f"engine.model={where}: no such folder; give a model folder, the URL of one, or a hub id such as BAAI/CapsFus-LLaMA"
        )
    return None


def inspect(engine: EngineConfig) -> ModelInfo:
    """Raises ConfigError for a folder that is no model and a hub id that cannot be resolved, StorageError for its store's faults."""
    if engine.kind == "echo":
        return ModelInfo(TEMPLATE, "echo", False, None, {})
    if engine.kind == "api":
        Template.parse(template := engine.api.prompt or TEMPLATE)
        return ModelInfo(template, f"api:{engine.api.model}", False, None, {})
    where, folder = locate(engine.model), store_of(engine)
    if folder is None:
        commit, wish = _ask_hub(where, engine.revision)
        return _info(_HUB + commit, wish, embedded=False)  # folder_of checks the rest of it, once it is here
    check_folder(folder, engine.trust_remote_code)
    if "config.json" not in {file.path for file in content_files(folder)}:
        raise ConfigError(f"engine.model={where}: no config.json in it; give a folder as save_pretrained writes it")
    content = content_hash(folder)
    if engine.revision not in ("", content):
        raise ConfigError(
            f"engine.revision={engine.revision}: engine.model={where} holds {content}; give the folder that was meant, or no engine.revision"
        )
    return _info(content, wishes_of(folder), embedded=not engine.model)


def _info(content: str, wish: dict[str, Any], embedded: bool) -> ModelInfo:
    template = wish.get("prompt_template", TEMPLATE)
    return ModelInfo(template, content, embedded, wish.get("max_prompt_tokens"), wish.get("decode", {}))


def wishes_of(folder: Store) -> dict[str, Any]:
    """What its fusion.json says; nothing without one. Raises ConfigError for one that is not of its form."""
    found = folder.get_with_etag(FUSION_FILE)
    return _parse_fusion_file(folder.url(FUSION_FILE), found[0]) if found else {}


def _parse_fusion_file(path: str, data: bytes) -> dict[str, Any]:
    wish = _json_object(path, data)
    decode = wish.get("decode", {})
    template, longest = wish.get("prompt_template", TEMPLATE), wish.get("max_prompt_tokens", 1)
    for name, value, fits, form in (
        ("prompt_template", template, isinstance(template, str), "a text"),
        ("max_prompt_tokens", longest, type(longest) is int and longest > 0, "a whole number above 0"),
        ("decode", decode, isinstance(decode, dict), "an object"),
    ):
        if not fits:
            raise ConfigError(f"{path}: {name}={value!r:.80}: must be {form}; mend or remove it")
    unknown = set(wish) - {"prompt_template", "max_prompt_tokens", "decode"}
    unknown |= {f"decode.{name}" for name in decode if name not in WISHES}
    if unknown:
        raise ConfigError(
            f"{path}: unknown keys {sorted(unknown)}; it may hold prompt_template, max_prompt_tokens, decode ({', '.join(WISHES)})"
        )
    for name, value in decode.items():
        if type(value) not in WISHES[name] or (type(value) is float and not math.isfinite(value)):
            kinds = " or ".join(kind.__name__ for kind in WISHES[name])
            raise ConfigError(f"{path}: decode.{name}={value!r:.80}: must be {kinds}")
    try:
        Template.parse(template)
        DecodeConfig().settled(decode)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return wish


def settle(engine: EngineConfig, decode: DecodeConfig, model: ModelInfo) -> tuple[EngineConfig, SettledDecode]:
    """Fill what the config leaves to the model folder, and pin the model: actors load what `model` was read from.

    Raises ConfigError for decoding that the engine cannot do.
    """
    if engine.loads_model:
        engine = dataclasses.replace(engine, revision=model.revision)
    settled = decode.settled(model.decode)
    if engine.kind == "vllm":
        settled.refuse_beams("vllm")
    if model.max_prompt_tokens and engine.max_prompt_tokens > model.max_prompt_tokens:
        engine = dataclasses.replace(engine, max_prompt_tokens=model.max_prompt_tokens)
    return engine, settled


# --------------------------------------------------------------------------- what the folder of a stranger may not do


def check_folder(folder: Store, trust_remote_code: bool) -> None:
    """Raises ConfigError for a folder of which a loader would run code, read a file elsewhere, or load a half.

    Looks at names, links and small files; reads no weights. Some code runs only where transformers or vLLM is told to
    (`auto_map`, custom_generate/): they refuse it themselves, and many models that name such code do without it.
    """
    if "://" not in folder.root:
        _check_links(Path(os.path.realpath(folder.root)))
    names = [file.path for file in folder.list() if "/" not in file.path]
    if adapter := next((name for name in names if name.startswith(_ADAPTERS)), None):
        raise ConfigError(
            f"{folder.url(adapter)}: adapters are not supported yet, and without it the base model would write; merge it "
            "first (merge_and_unload of peft), and give the folder of the merged model"
        )
    for name in names:
        if name.endswith((*_INDEXES, _SETTINGS)) or name in _TABLES:
            path = folder.url(name)
            said = _json_object(path, folder.get(name))
            if name.endswith(_INDEXES):
                _check_index(path, said)
            elif name not in _TABLES:
                for where, key, value in _entries(path, said):
                    _check_setting(f"{path}: {where}{key}={value!r:.80}", key, value, trust_remote_code)


def _check_links(top: Path) -> None:
    """A link may lead to a file of the folder, or from a snapshot of the hub's cache to a blob beside it."""
    blobs = top.parent.parent / "blobs" if top.parent.name == "snapshots" else None
    for folder, folders, names in os.walk(top):  # it does not follow links
        for path in (Path(folder, name) for name in folders + names):
            target = Path(os.path.realpath(path))
            if path.is_symlink() and not target.is_relative_to(top) and target.parent != blobs:
                raise ConfigError(
                    f"{path}: a link out of the model's folder, to {target}; put the file itself there, or remove the link"
                )
            if target.exists() and not target.is_file() and not target.is_dir():
                raise ConfigError(f"{path}: neither a file nor a folder (a pipe, a socket or a device); remove it")


def _check_index(path: str, said: dict[str, Any]) -> None:
    files, kind = said.get("weight_map"), Path(path.removesuffix(".index.json")).suffix
    if not isinstance(files, dict) or not isinstance(said.get("metadata", {}), dict):
        raise ConfigError(f"{path}: weight_map and metadata must be objects; fetch the model again")
    for weight, file in files.items():
        if not _in_the_folder(file) or not file.endswith(kind):
            raise ConfigError(
                f"{path}: {weight}={file!r:.200}: no {kind} file of this very folder; mend the index, or use another model"
            )


def _in_the_folder(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _check_setting(shown: str, key: str, value: Any, trust_remote_code: bool) -> None:
    """`shown`: the setting and its place. Raises ConfigError for one that leads out of the folder or asks for code."""
    files = value if isinstance(value, list) else [] if value is None else [value]
    named = key.endswith(("_file", "_files")) and key != "special_tokens_map_file"  # that one is never opened
    if (named or key == "transformers_weights") and not all(map(_in_the_folder, files)):
        raise ConfigError(f"{shown}: no file of this very folder; remove the setting")
    if key == "init_inputs" and value:
        raise ConfigError(f"{shown}: would be taken for a tokenizer's files; remove the setting")
    if key == "speculators_config" and value:
        raise ConfigError(f"{shown}: vLLM would load the model that it names; give that one, or remove the setting")
    if key == "tokenizer_class" and value is not None and not _TOKENIZER_CLASS.fullmatch(str(value)):
        raise ConfigError(f"{shown}: no class of a tokenizer; remove the setting")
    if trust_remote_code:
        return
    public = key.removeprefix("_").removesuffix("_internal")
    asked = list(value.values()) if isinstance(value, dict) else [value]
    if not all(one in _OWN_KERNELS.get(public, asked) for one in asked) or (key in _ASKS_FOR_CODE and value):
        raise ConfigError(
            f"{shown}: asks for code from elsewhere; remove the setting, or give engine.trust_remote_code=true"
        )


def _entries(path: str, said: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Where, key and value of each entry, those of nested objects and lists too."""
    todo: list[tuple[str, Any, int]] = [("", said, 1)]
    while todo:
        where, held, depth = todo.pop()
        if depth > _DEEPEST:
            raise ConfigError(f"{path}: more than {_DEEPEST} objects or lists within each other; fetch the model again")
        for key, value in held.items() if isinstance(held, dict) else enumerate(held):
            yield where, str(key), value
            if isinstance(value, (dict, list)):
                todo.append((f"{where}{key}.", value, depth + 1))


def _json_object(path: str, data: bytes) -> dict[str, Any]:
    try:
        said = json.loads(data.decode(), parse_constant=_no_nan)
    except RecursionError:
        raise ConfigError(f"{path}: too many objects or lists within each other; fetch the model again") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); mend or remove it") from None
    if not isinstance(said, dict):
        raise ConfigError(f"{path}: must hold a JSON object, and holds a {type(said).__name__}; mend or remove it")
    return said


def _no_nan(name: str) -> float:
    if name == "NaN":  # an infinity may be meant: Mamba's time_step_limit has one
        raise ValueError("it holds NaN")
    return float(name)


# ----------------------------------------------------------------------------------------- what tells its content


def content_files(folder: Store) -> list[StoredFile]:
    """The files of a model folder that decide what the model writes; README and subfolders do not."""
    return [file for file in folder.list() if "/" not in file.path and file.path.endswith(_CONTENT_SUFFIXES)]


def content_hash(folder: Store) -> str:
    """Of names, sizes and bytes, never times: the same for the folder on disk and its copy in a bucket."""
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


def _ask_hub(model: str, revision: str) -> tuple[str, dict[str, Any]]:
    """The commit, and what its fusion.json says. A commit that HF_HOME already holds is not asked for anew.

    Two small files are fetched, so that a commit which nodes cannot get is found out here. Raises ConfigError.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    asked, name = revision or None, f"engine.model={model}" + (f" engine.revision={revision}" if revision else "")
    try:
        cached = try_to_load_from_cache(model, "config.json", revision=asked)
        config = cached if isinstance(cached, str) else hf_hub_download(model, "config.json", revision=asked)
        commit = Path(config).parent.name  # …/snapshots/<commit>/config.json
    except (HFValidationError, EntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{name}: neither a folder here nor a model of the hub that can be reached ({type(error).__name__}); give a model "
            "folder or its URL, or HF_TOKEN where the hub wants one, or fetch the model into HF_HOME first (hf download)"
        ) from None
    path = try_to_load_from_cache(model, FUSION_FILE, revision=commit)
    if path is None:  # it is not known yet whether there is one
        try:
            path = hf_hub_download(model, FUSION_FILE, revision=commit)
        except (EntryNotFoundError, OSError) as error:
            unknown = isinstance(error, LocalEntryNotFoundError) or not isinstance(error, EntryNotFoundError)
            if unknown and not constants.HF_HUB_OFFLINE:
                raise ConfigError(
                    f"{name}: the hub cannot be asked whether the model has a {FUSION_FILE} ({type(error).__name__}), and with "
                    "another prompt it writes another dataset; mend the network, or give HF_HUB_OFFLINE=1 if it has none"
                ) from None
            if unknown:
                log.warning("%s: HF_HOME holds no %s of it; taken as if it had none", name, FUSION_FILE)
    return commit, _parse_fusion_file(f"{model}/{FUSION_FILE}", Path(path).read_bytes()) if isinstance(
        path, str
    ) else {}
