"""What a run must know of a model before it loads any weights: its prompt, its decoding settings and its content.

Loads no weights and fetches none. Knows no torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from capsfusion_ray.config import DecodeConfig, EngineConfig, ResolvedDecode
from capsfusion_ray.core.prompt import TEMPLATE, Template
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.models.content import content_files, content_hash
from capsfusion_ray.models.folder_checks import check_folder
from capsfusion_ray.models.fusion_file import read_fusion_file
from capsfusion_ray.models.hub import ask_hub
from capsfusion_ray.models.location import locate, store_of

_HUB = "hub:"


@dataclass(frozen=True)
class ModelInfo:
    """A model as a run needs to know it before any weights are loaded."""

    template: str  # of the prompt, with {raw} and {synthetic}
    content: str  # hash of the folder's files, or hub:<commit>; part of the base fingerprint
    embedded: bool  # the demo model
    max_prompt_tokens: int | None  # that the model was trained with; None: its folder does not say
    decode: dict[str, Any]  # decoding settings of its fusion.json

    @property
    def revision(self) -> str:
        """The hub's commit or the content hash of the folder. Every node must find the model with it."""
        return self.content.removeprefix(_HUB)


def inspect_model(engine: EngineConfig) -> ModelInfo:
    """Look at the model of `engine` without its weights.

    Raises ConfigError if the folder is no model or is refused (models/folder_checks.py), or if the hub does not give the
    model; StorageError if the store fails.
    """
    if engine.kind == "echo":
        return ModelInfo(TEMPLATE, "echo", False, None, {})
    if engine.kind == "api":
        Template.parse(template := engine.api.prompt or TEMPLATE)
        return ModelInfo(template, f"api:{engine.api.model}", False, None, {})
    where, folder = locate(engine.model), store_of(engine)
    if folder is None:
        commit, settings = ask_hub(where, engine.revision)
        return _info(
            _HUB + commit, settings, embedded=False
        )  # cache.folder_of checks the other files after it fetched them
    check_folder(folder, engine.trust_remote_code)
    if "config.json" not in {file.path for file in content_files(folder)}:
        raise ConfigError(f"engine.model={where}: no config.json in it; give a folder as save_pretrained writes it")
    content = content_hash(folder)
    if engine.revision not in ("", content):
        raise ConfigError(
            f"engine.revision={engine.revision}: engine.model={where} holds {content}; give the folder with that content, or leave engine.revision empty"
        )
    return _info(content, read_fusion_file(folder), embedded=not engine.model)


def _info(content: str, settings: dict[str, Any], embedded: bool) -> ModelInfo:
    template = settings.get("prompt_template", TEMPLATE)
    return ModelInfo(template, content, embedded, settings.get("max_prompt_tokens"), settings.get("decode", {}))


def resolve_with_model(
    engine: EngineConfig, decode: DecodeConfig, model: ModelInfo
) -> tuple[EngineConfig, ResolvedDecode]:
    """Fill the settings that the config leaves to the model folder, and set engine.revision, so that actors load this very model.

    Raises ConfigError if the engine cannot decode that way.
    """
    if engine.loads_model:
        engine = dataclasses.replace(engine, revision=model.revision)
    resolved = decode.resolved(model.decode)
    if engine.kind == "vllm":
        resolved.refuse_beams("vllm")
    if model.max_prompt_tokens and engine.max_prompt_tokens > model.max_prompt_tokens:
        engine = dataclasses.replace(engine, max_prompt_tokens=model.max_prompt_tokens)
    return engine, resolved
