"""List every key of a config dataclass with its type, default and explanation: for the parser, --help and the reference page."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from capsfusion_ray.config.setting import marks_of


@dataclass(frozen=True)
class Key:
    """One key, such as decode.num_beams. `wants` is its type in words; "section" for a group of keys, "mapping" for a free-form dict."""

    name: str
    wants: str
    default: Any
    text: str
    common: bool
    section: str  # the first part of the name; empty for a key of the job itself

    @property
    def shown_default(self) -> str:
        """The default as one would type it."""
        if self.default is None or isinstance(self.default, bool):
            return {None: "null", True: "true", False: "false"}[self.default]
        return str(self.default)


def keys_of(schema: type) -> list[Key]:
    """Every key below a config dataclass, sections included, in the order of declaration."""
    return list(_keys(schema, {f.name: default_of(f) for f in dataclasses.fields(schema)}, "", ""))


def _keys(schema: type, defaults: dict[str, Any], prefix: str, told: str) -> Iterator[Key]:
    hints = typing.get_type_hints(schema)
    for declared in dataclasses.fields(schema):
        name, default, marks = prefix + declared.name, defaults[declared.name], marks_of(declared)
        hint = unwrap_optional(hints[declared.name])
        top = name.partition(".")[0] if "." in name else ""
        if dataclasses.is_dataclass(hint):
            yield Key(name, "section", default, marks.text, False, top)
            yield from _keys(typing.cast(type, hint), vars(default), f"{name}.", marks.text)
        else:
            wants = "mapping" if typing.get_origin(hint) is dict else describe(hints[declared.name])
            # The text of a section explains its threshold: a gate has one text and three keys.
            text = told if told and declared.name == "threshold" else marks.text
            yield Key(name, wants, default, text, marks.common, top)


def required_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """The names of the keys that a user must give."""
    hints = typing.get_type_hints(schema)
    for declared in dataclasses.fields(schema):
        hint = unwrap_optional(hints[declared.name])
        for inner in marks_of(declared).required:
            yield f"{prefix}{declared.name}.{inner}" if inner else f"{prefix}{declared.name}"
        if dataclasses.is_dataclass(hint):
            yield from required_keys(typing.cast(type, hint), f"{prefix}{declared.name}.")


def unwrap_optional(hint: Any) -> Any:
    """`X` for `X | None`, and any other type as it is."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        return inner[0] if len(inner) == 1 else hint
    return hint


def describe(hint: Any) -> str:
    """A type in words: "int or null", "one of a, b"."""
    optional = hint is not unwrap_optional(hint)
    inner = unwrap_optional(hint)
    if typing.get_origin(inner) is Literal:
        text = "one of " + ", ".join(str(a) for a in typing.get_args(inner))
    elif inner is Any:
        text = "path or list of paths"  # the only keys of any type
    else:
        text = (
            getattr(inner, "__name__", str(inner)) if not typing.get_args(inner) else str(inner).replace("typing.", "")
        )
    return f"{text} or null" if optional else text


def default_of(declared: dataclasses.Field[Any]) -> Any:
    """The default of a field, made anew; for a section a dataclass of defaults."""
    if declared.default is not dataclasses.MISSING:
        return declared.default
    assert declared.default_factory is not dataclasses.MISSING, f"{declared.name}: every key of a config has a default"
    return declared.default_factory()


def usage(schema: type) -> str:
    """The keys of a job for --help, one per line: first those that people set, then those of experts."""
    keys = [key for key in keys_of(schema) if key.wants != "section"]
    parts = [("Keys that people set", [key for key in keys if key.common])]
    parts.append(("Keys for experts" if parts[0][1] else "Keys", [key for key in keys if not key.common]))
    lines = []
    for title, listed in parts:
        if listed:
            lines += [f"{title}: key=default  (what it wants) what it does", *(_usage_line(key) for key in listed), ""]
    return "\n".join([*lines, "docs/configuration.md has the same list with a text per section."])


def _usage_line(key: Key) -> str:
    return f"  {key.name}={key.shown_default}  ({key.wants}) {key.text}".rstrip()
