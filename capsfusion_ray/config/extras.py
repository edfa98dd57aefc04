"""Optional dependencies: an import that fails names the extra of pyproject.toml that installs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from capsfusion_ray.errors import ConfigError


def install_hint(extra: str) -> str:
    """The command that installs the packages of an extra."""
    return f"pip install 'capsfusion-ray[{extra}]'"


@contextmanager
def imports_of(extra: str) -> Iterator[None]:
    """Around the imports of an extra's packages. Raises ConfigError with `install_hint` where one is not installed."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"{error}; this needs packages that are optional: {install_hint(extra)}") from error
