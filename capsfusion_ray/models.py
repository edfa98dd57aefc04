"""Which prompt and decoding a model wants, and what tells its content. Loads no weights, fetches none; knows no torch.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capsfusion_ray.config import DecodeConfig, EngineConfig, SettledDecode
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.prompt import TEMPLATE, Template
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
    """The demo model: beside the package in a checkout or a `ray job submit` upload, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    for place in (package.parent / "models" / EMBEDDED, package / "_models" / EMBEDDED):
        if (place / "config.json").is_file():
            return place
    raise ConfigError(
        f"engine.model is empty and the embedded model {EMBEDDED} is neither in {package.parent / 'models'} nor in the "
        "installed package; give engine.model=<folder or hub id>"
    )


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
        return _info(_HUB + commit, wish, embedded=False)
    if "config.json" not in {file.path for file in content_files(folder)}:
        raise ConfigError(f"engine.model={where}: no config.json in it; give a folder as save_pretrained writes it")
    content = content_hash(folder)
    if engine.revision not in ("", content):
        raise ConfigError(
            f"engine.revision={engine.revision}: engine.model={where} holds {content}; give the folder that was meant, or no engine.revision"
        )
    found = folder.get_with_etag(FUSION_FILE)
    wish = _parse_fusion_file(folder.url(FUSION_FILE), found[0]) if found else {}
    return _info(content, wish, embedded=not engine.model)


def _info(content: str, wish: dict[str, Any], embedded: bool) -> ModelInfo:
    template = wish.get("prompt_template", TEMPLATE)
    Template.parse(template)
    return ModelInfo(template, content, embedded, wish.get("max_prompt_tokens"), wish.get("decode", {}))


def _parse_fusion_file(path: str, data: bytes) -> dict[str, Any]:
    try:
        wish = json.loads(data)
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); mend or remove it") from None
    unknown = set(wish) - {"prompt_template", "max_prompt_tokens", "decode"}
    unknown |= {f"decode.{name}" for name in wish.get("decode", {}) if name not in WISHES}
    if unknown:
        raise ConfigError(f"{path}: unknown keys {sorted(unknown)}; it may hold prompt_template, max_prompt_tokens, decode ({', '.join(WISHES)})")
    for name, value in wish.get("decode", {}).items():
        if not isinstance(value, WISHES[name]):
            raise ConfigError(f"{path}: decode.{name}={value!r}: must be {' or '.join(kind.__name__ for kind in WISHES[name])}")
    try:
        DecodeConfig().settled(wish.get("decode", {}))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return dict(wish)


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
    return commit, _parse_fusion_file(f"{model}/{FUSION_FILE}", Path(path).read_bytes()) if isinstance(path, str) else {}
