"""Where a model is, which prompt and decoding it wants, and a hash of its content. Loads no weights; knows no torch.

A fusion model is a Hugging Face model folder (or hub id) that may carry a `fusion.json`:
{"prompt_template": "… {raw} … {synthetic} …", "max_prompt_tokens": 256,
 "decode": {"scoring": "transformers", "length_penalty": 1.5, "no_repeat_ngram": 5}}.
Without one it is prompted with CapsFusion's own text, to the letter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capsfusion_ray.config import DecodeConfig, EngineConfig, SettledDecode
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.prompt import TEMPLATE, Template

EMBEDDED = "capsfusion-tiny"
FUSION_FILE = "fusion.json"
# What a model folder may say of decoding.
WISHES: dict[str, tuple[type, ...]] = {"scoring": (str,), "length_penalty": (int, float), "no_repeat_ngram": (int,)}
_SAMPLE_BYTES = 1 << 20
_WHOLE_BYTES = 64 << 20  # larger weight files are sampled at five places: 26 GB would take a minute to hash
_CONTENT_SUFFIXES = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja"}


@dataclass(frozen=True)
class ModelInfo:
    """What the run must know of a model before any weights are loaded."""

    template: str
    content: str  # hash of the folder's files, or the hub's commit; part of the base fingerprint
    embedded: bool
    max_prompt_tokens: int | None
    decode: dict[str, Any]


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
    """`engine.model` as from_pretrained takes it: a folder's path or a hub id. Empty: the embedded model's folder."""
    return model or str(embedded_path())


def inspect(engine: EngineConfig) -> ModelInfo:
    """Raises ConfigError for a folder that is no model and a hub id that cannot be resolved."""
    if engine.kind == "echo":
        return ModelInfo(TEMPLATE, "echo", False, None, {})
    if engine.kind == "api":
        Template.parse(template := engine.api.prompt or TEMPLATE)
        return ModelInfo(template, f"api:{engine.api.model}", False, None, {})
    where = locate(engine.model)
    folder = Path(where)
    if not folder.is_dir():
        if "://" in where or where.startswith((".", "/", "~")) or where.count("/") > 1:
            raise ConfigError(f"engine.model={where}: no such folder; give a model folder or a hub id such as BAAI/CapsFus-LLaMA")
        return ModelInfo(TEMPLATE, _hub_commit(where), False, None, {})
    if not (folder / "config.json").is_file():
        raise ConfigError(f"engine.model={where}: no config.json in it; give a folder as save_pretrained writes it")
    wish = _read_fusion_file(folder / FUSION_FILE)
    template = wish.get("prompt_template", TEMPLATE)
    Template.parse(template)
    return ModelInfo(template, content_hash(folder), not engine.model, wish.get("max_prompt_tokens"), wish.get("decode", {}))


def _read_fusion_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        wish = json.loads(path.read_text("utf-8"))
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
    """Fill what the config leaves to the model folder."""
    if model.max_prompt_tokens and engine.max_prompt_tokens > model.max_prompt_tokens:
        engine = dataclasses.replace(engine, max_prompt_tokens=model.max_prompt_tokens)
    return engine, decode.settled(model.decode)


def content_hash(folder: Path) -> str:
    """Hash of the files that decide what the model writes: names, sizes and bytes, never times. README is not one."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in _CONTENT_SUFFIXES):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_BYTES:
                digest.update(file.read())
            else:
                for i in range(5):
                    file.seek((size - _SAMPLE_BYTES) * i // 4)
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _hub_commit(model: str) -> str:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    cached = None
    try:
        cached = try_to_load_from_cache(model, "config.json")
        if isinstance(cached, str):  # …/snapshots/<commit>/config.json
            return f"hub:{Path(cached).parent.name}"
        return f"hub:{HfApi().model_info(model, timeout=20).sha}"
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ConfigError(
            f"engine.model={model}: neither a folder here nor a hub id that can be reached ({type(error).__name__}); "
            "give a model folder, or fetch the model into HF_HOME first"
        ) from None
