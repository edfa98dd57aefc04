"""Declare the keys of a config dataclass: default value, explanation, and whether people set it or must give it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

T = TypeVar("T")
_MARKS = "capsfusion"


@dataclass(frozen=True)
class Marks:
    """What is known of a key beside its type and default."""

    text: str = ""  # the explanation, for --help and docs/configuration.md
    common: bool = False  # people set it; False: an expert's key, listed after the common ones
    required: Sequence[str] = ()  # keys that the user must give: ("",) this one, ("path",) that key of a section


def setting(default: T, text: str, *, common: bool = False, required: bool = False) -> T:
    """A key with a default. A list or dict is copied for each config. `required`: an empty value is refused by parse_config."""
    metadata = {_MARKS: Marks(text, common, ("",) if required else ())}
    if isinstance(default, list | dict):
        made = cast(Callable[[], T], default.copy)
        return field(default_factory=made, metadata=metadata)
    return field(default=default, metadata=metadata)


def section(make: Callable[[], T], text: str = "", *, required: Sequence[str] = ()) -> T:
    """A section: the keys of the dataclass that `make` returns with its defaults. `required`: the names that the user must give."""
    return field(default_factory=make, metadata={_MARKS: Marks(text, required=tuple(required))})


def marks_of(declared: dataclasses.Field[Any]) -> Marks:
    """The marks that `setting` or `section` left on a field."""
    found: Mapping[str, Marks] = declared.metadata
    return found.get(_MARKS, Marks())
