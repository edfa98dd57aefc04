"""Where a model is: a folder on this node, a folder in a store, the Hugging Face hub, or the embedded demo model."""

from __future__ import annotations

from pathlib import Path

from capsfusion_ray.config import EngineConfig
from capsfusion_ray.config.bundled import bundled
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.storage import Store

EMBEDDED = "capsfusion-tiny"


def embedded_path() -> Path:
    """The folder of the demo model that comes with the package. Raises ConfigError if the package lacks it."""
    return bundled(f"models/{EMBEDDED}")


def locate(model: str) -> str:
    """`engine.model` itself, or the folder of the embedded model if that is empty."""
    return model or str(embedded_path())


def store_of(engine: EngineConfig) -> Store | None:
    """A store at the folder of `engine.model`, on this node or at a URL; None for a hub id.

    Raises ConfigError for a local path that does not exist.
    """
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
