"""Find the files that come with the package: conf/, examples/captions and models/capsfusion-tiny.

They are beside the package in a checkout and in the upload of `ray job submit`, and inside of it, in `_bundled/`, in an
installed wheel (pyproject.toml puts them there).
"""

from __future__ import annotations

from pathlib import Path

from capsfusion_ray.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]


def bundled(name: str) -> Path:
    """The bundled file or folder `name`, a path such as conf/demo.yaml or examples/captions. Raises ConfigError without one."""
    for folder in (_PACKAGE / "_bundled", _PACKAGE.parent):
        if (found := folder / name).exists():
            return found
    raise ConfigError(
        f"{name}: it is neither in {_PACKAGE / '_bundled'} nor in {_PACKAGE.parent}; install the package anew, or give a path of your own"
    )
