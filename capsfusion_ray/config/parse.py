"""YAML fragments and `key=value` words -> one frozen config, parsed once, at the door; and back to plain values."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from capsfusion_ray.config.bundled import bundled
from capsfusion_ray.errors import ConfigError

T = TypeVar("T")
_SECRET = ("secret", "key", "token", "password", "credential", "connection_string")


def parse_config(schema: type[T], argv: typing.Sequence[str | typing.Mapping[str, Any]]) -> T:
    """Merge YAML fragments left to right, then the overrides, wherever they stand, into one frozen config.

    An override is a word `key=value`, or a mapping whose keys are dotted (`{"input.path": …}`) or nested (`{"input": {"path": …}}`).

    Raises ConfigError for a missing file, an unknown key (naming the nearest valid one), a value of the wrong type, or one
    that a fragment demands (???) and nobody gives.
    """
    files: list[DictConfig] = []
    overrides: list[DictConfig] = []
    valid, demanded = _keys(schema), dict[str, str]()
    for argument in argv:
        if not isinstance(argument, str):
            overrides.append(part := _from_mapping(argument))
            _refuse_unknown(part, valid, "config")
            continue
        key, equals, value = argument.partition("=")
        if argument.startswith("-"):
            raise ConfigError(
                f"{argument}: there are no flags but --help; give YAML files first, then key=value (see docs/configuration.md)"
            )
        if equals:
            overrides.append(part := _parse_override(key, value, valid))
        elif argument.endswith((".yaml", ".yml")):
            files.append(part := _read_yaml(argument))
        else:
            raise ConfigError(f"{argument}: neither a .yaml file nor key=value")
        _refuse_unknown(part, valid, argument)
        demanded |= dict.fromkeys(OmegaConf.missing_keys(part), argument)  # what it has as ???
    merged = typing.cast(DictConfig, OmegaConf.merge({}, *files, *overrides))
    for key, file in demanded.items():
        if OmegaConf.select(merged, key) is None:
            raise ConfigError(f"{file}: it leaves {key} to you; give {key}=…")
    try:
        typed = OmegaConf.merge(OmegaConf.structured(schema), merged)
        built = OmegaConf.to_object(typed)
    except ConfigError:
        raise
    except OmegaConfBaseException as error:
        first_line = str(error).splitlines()[0]
        key = getattr(error, "full_key", None) or ""
        raise ConfigError(f"{key}: {first_line}; it wants {valid.get(key, 'another type')}") from None
    return typing.cast(T, built)


def _parse_override(key: str, value: str, valid: dict[str, str]) -> DictConfig:
    # A value of a text field is taken literally: a caption column named `null`, a path with `[` or a secret of figures
    # must not become YAML.
    if valid.get(key, "").startswith("str") or _in_storage(key):
        part = OmegaConf.create({})
        OmegaConf.update(part, key, value)
        return part
    try:
        return OmegaConf.from_dotlist([f"{key}={value}"])
    except Exception as error:  # omegaconf lets the YAML parser's own exceptions through
        raise ConfigError(
            f"{key}={value}: not a YAML value ({str(error).splitlines()[0]}); put texts with signs of YAML in quotes, and the whole in "
            f'those of the shell: \'{key}=["a[0-9].json", "b"]\''
        ) from None


def _from_mapping(values: typing.Mapping[str, Any]) -> DictConfig:
    part = OmegaConf.create({})
    try:
        for key, value in values.items():
            OmegaConf.update(part, key, _plain(value), merge=True)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{key}={value!r}: not a value of a configuration ({str(error).splitlines()[0]}); give a text, a number, true, false, "
            "null, a list or a mapping"
        ) from None
    return part


def _plain(value: Any) -> Any:
    """The value with lists for tuples and texts for paths, which YAML does not have."""
    if isinstance(value, typing.Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


# In a YAML file: "${bundled:examples/captions}" is the path of a file or folder that comes with the package.
def _bundled_path(name: str) -> str:
    return str(bundled(name))


OmegaConf.register_resolver("bundled", _bundled_path, replace=True)


def _read_yaml(path: str) -> DictConfig:
    """A YAML fragment. A file conf/… that is not in the current folder is taken from the package."""
    file = Path(path)
    if not file.is_file():
        file = _packaged(path)
    try:
        part = OmegaConf.load(file)
    except Exception as error:  # YAML's own exceptions
        raise ConfigError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(part, DictConfig):
        raise ConfigError(f"{path}: the top level must be key: value pairs")
    return part


def _packaged(path: str) -> Path:
    """The package's own conf/….yaml of that name. Raises ConfigError with the nearest name where there is none."""
    conf = bundled("conf")
    if path.startswith("conf/") and (file := conf.parent / path).is_file():
        return file
    have = [str(p.relative_to(conf.parent)) for p in conf.rglob("*.yaml")]
    near = difflib.get_close_matches(path, [*(str(p) for p in Path("conf").rglob("*.yaml")), *have], n=1, cutoff=0.4)
    raise ConfigError(f"{path}: no such file" + (f"; did you mean {near[0]}?" if near else ""))


def unwrap_optional(hint: Any) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        return inner[0] if len(inner) == 1 else hint
    return hint


def describe(hint: Any) -> str:
    optional = hint is not unwrap_optional(hint)
    inner = unwrap_optional(hint)
    if typing.get_origin(inner) is Literal:
        text = "one of " + ", ".join(str(a) for a in typing.get_args(inner))
    else:
        text = getattr(inner, "__name__", str(inner)) if not typing.get_args(inner) else str(inner)
    return f"{text} or null" if optional else text


def _keys(schema: Any, prefix: str = "") -> dict[str, str]:
    """Every dotted key of a schema -> what it wants; sections map to 'section', free-form dicts to 'mapping'."""
    keys: dict[str, str] = {}
    hints = typing.get_type_hints(schema)
    for f in dataclasses.fields(schema):
        hint = unwrap_optional(hints[f.name])
        if dataclasses.is_dataclass(hint):
            keys[prefix + f.name] = "section"
            keys |= _keys(hint, f"{prefix}{f.name}.")
        elif typing.get_origin(hint) is dict:
            keys[prefix + f.name] = "mapping"
        else:
            keys[prefix + f.name] = describe(hints[f.name])
    return keys


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default, made anew; of a section its defaults. A whole config may have none: it may demand a key."""
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[operator]


def usage(schema: type) -> str:
    """Every key with its default and what it wants, a line each: what --help prints."""
    defaults, lines = (
        {f.name: default_of(f) for f in dataclasses.fields(schema)},
        ["key=default  (what it wants; more in docs/configuration.md)"],
    )
    for key, want in _keys(schema).items():
        if want != "section":
            top, *names = key.split(".")
            value = defaults[top]
            for name in names:
                value = getattr(value, name)
            lines.append(f"  {key}={'null' if value is None else value}  ({want})")
    return "\n".join(lines)


def _refuse_unknown(part: DictConfig, valid: dict[str, str], where: str, prefix: str = "") -> None:
    for name in part:
        key = f"{prefix}{name!s}"
        if key not in valid:
            leaves = [k for k, want in valid.items() if want != "section"]
            near = difflib.get_close_matches(key, leaves, n=1, cutoff=0.5)
            if not near:  # a right name in the wrong section: kind=echo -> engine.kind
                near = [k for k in leaves if k.rsplit(".", 1)[-1] == str(name)][:1]
            hint = f"did you mean {near[0]}?" if near else f"valid here: {', '.join(sorted(leaves)[:12])} …"
            raise ConfigError(f"{where}: unknown key {key}; {hint}")
        value = part._get_node(name)
        if valid[key] == "section":
            if not isinstance(value, DictConfig):
                raise ConfigError(
                    f"{where}: {key} is a section; give one of its keys, such as {_first_below(key, valid)}"
                )
            _refuse_unknown(value, valid, where, key + ".")


def _first_below(key: str, valid: dict[str, str]) -> str:
    return next(k for k in valid if k.startswith(key + "."))


def is_secret(option: str) -> bool:
    """Of a storage option's name: its value must not be seen."""
    return any(word in option.lower() for word in _SECRET)


def without_secrets(words: typing.Sequence[str]) -> list[str]:
    """A command line as it may be shown: the value of a `….storage.secret=…` masked."""

    def shown(word: str) -> str:
        key, _, value = word.partition("=")
        # {…}: a whole section at once, such as output={path: …, storage: {secret: …}}
        section = key.endswith("storage") or ("storage" in value and value.lstrip().startswith("{"))
        secret = is_secret(key.rpartition(".")[2]) if _in_storage(key) else section and is_secret(value)
        return f"{key}=***" if secret and value else word

    return [shown(word) for word in words]


def _in_storage(key: str) -> bool:
    """Of a dotted key: an option of a store, such as output.storage.secret or to_storage.secret."""
    return key.rpartition(".")[0].endswith("storage")


def as_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain nested dicts, secrets of storage options masked."""

    def masked(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {k: masked(v, f"{name}.{k}") for k, v in value.items()}
        secret = _in_storage(name) and is_secret(name.rpartition(".")[2])
        return "***" if secret and value else value

    return {k: masked(v, k) for k, v in dataclasses.asdict(config).items()}


def to_yaml(config: Any) -> str:
    """The resolved config, as saved with the output; secrets masked."""
    return OmegaConf.to_yaml(OmegaConf.create(as_dict(config)))


def fingerprint(parts: dict[str, Any]) -> str:
    """A short stable hash of JSON-able values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
