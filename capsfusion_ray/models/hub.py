"""Ask the Hugging Face hub, or its cache under HF_HOME, for the commit and the fusion.json of a model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from capsfusion_ray.errors import ConfigError
from capsfusion_ray.models.fusion_file import FUSION_FILE, parse_fusion_file

log = logging.getLogger(__name__)


def ask_hub(model: str, revision: str) -> tuple[str, dict[str, Any]]:
    """The commit of `model` at `revision` (empty: main), and the settings in its fusion.json.

    The hub is not asked about a commit that HF_HOME holds already. Two small files are fetched, so that a commit which the
    nodes cannot fetch is found out here. Raises ConfigError.
    """
    asked, name = revision or None, f"engine.model={model}" + (f" engine.revision={revision}" if revision else "")
    commit = _commit_of(model, asked, name)
    path = _fusion_file_of(model, commit, name)
    return commit, parse_fusion_file(f"{model}/{FUSION_FILE}", Path(path).read_bytes()) if path else {}


def _commit_of(model: str, revision: str | None, name: str) -> str:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
        config = cached if isinstance(cached, str) else hf_hub_download(model, "config.json", revision=revision)
    except (HFValidationError, EntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{name}: neither a folder here nor a model that the hub gives ({type(error).__name__}); give a model folder or its "
            "URL, set HF_TOKEN if the hub asks for one, or fetch the model into HF_HOME first (hf download)"
        ) from None
    return Path(config).parent.name  # …/snapshots/<commit>/config.json


def _fusion_file_of(model: str, commit: str, name: str) -> str:
    """The path of fusion.json in the cache; empty if the model has none."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    path = try_to_load_from_cache(model, FUSION_FILE, revision=commit)
    if path is not None:  # a path, or the cache's note that the commit has no such file
        return path if isinstance(path, str) else ""
    try:
        return hf_hub_download(model, FUSION_FILE, revision=commit)
    except (EntryNotFoundError, OSError) as error:
        unknown = isinstance(error, LocalEntryNotFoundError) or not isinstance(error, EntryNotFoundError)
        if unknown and not constants.HF_HUB_OFFLINE:
            raise ConfigError(
                f"{name}: the hub does not answer whether the model has a {FUSION_FILE} ({type(error).__name__}), and another "
                "prompt would write another dataset; mend the network, or set HF_HUB_OFFLINE=1 on a machine without one"
            ) from None
        if unknown:
            log.warning("%s: HF_HOME holds no %s of this model; the default prompt is used", name, FUSION_FILE)
        return ""
