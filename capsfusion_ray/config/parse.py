"""Parse YAML fragments and `key=value` words into one frozen config."""

from __future__ import annotations

import difflib
import math
import typing
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from capsfusion_ray.config.bundled import bundled
from capsfusion_ray.config.keys import keys_of, required_keys
from capsfusion_ray.config.secrets import in_storage
from capsfusion_ray.errors import ConfigError

T = TypeVar("T")


def parse_config(schema: type[T], argv: typing.Sequence[str | typing.Mapping[str, Any]], complete: bool = True) -> T:
    """Merge YAML fragments from left to right, then the overrides, wherever they stand, into one frozen config.

    An override is a word `key=value`, or a mapping whose keys are dotted (`{"input.path": …}`) or nested (`{"input": {"path": …}}`).

    `complete=False`: for a fragment, which may leave required keys empty.

    Raises ConfigError for a missing file, an unknown key (naming the nearest valid one), a value of the wrong type, a
    required key that is empty, or a key that a fragment marks with ??? and nobody gives.
    """
    files: list[DictConfig] = []
    overrides: list[DictConfig] = []
    valid, demanded = {key.name: key.wants for key in keys_of(schema)}, dict[str, str]()
    for argument in argv:
        if not isinstance(argument, str):
            overrides.append(part := _from_mapping(argument))
            _refuse_unknown(part, valid, "config")
            continue
        key, equals, value = argument.partition("=")
        if argument.startswith("-"):
            raise ConfigError(
                f"{argument}: --help is the only flag; give YAML files first, then key=value (see docs/configuration.md)"
            )
        if equals:
            overrides.append(part := _parse_override(key, value, valid))
        elif argument.endswith((".yaml", ".yml")):
            files.append(part := _read_yaml(argument))
        else:
            raise ConfigError(f"{argument}: neither a .yaml file nor key=value")
        _refuse_unknown(part, valid, argument)
        demanded |= dict.fromkeys(OmegaConf.missing_keys(part), argument)  # the keys that it marks with ???
    merged = typing.cast(DictConfig, OmegaConf.merge({}, *files, *overrides))
    for key, file in demanded.items():
        if OmegaConf.select(merged, key) is None:
            raise ConfigError(f"{file}: it leaves {key} to you; give {key}=…")
    _refuse_not_finite(OmegaConf.to_container(merged))
    config = _built(schema, merged, valid)
    if complete:
        _refuse_missing(schema, merged)
    return config


def _refuse_not_finite(value: Any, key: str = "") -> None:
    """Raises ConfigError for NaN and infinity: no key has a use for them, and every comparison with NaN is false."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_not_finite(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            _refuse_not_finite(inner, key)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={value}: not a finite number; give a number, or leave the key out")


def _built(schema: type[T], merged: DictConfig, valid: dict[str, str]) -> T:
    try:
        return typing.cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), merged)))
    except ConfigError:
        raise
    except OmegaConfBaseException as error:
        first_line = str(error).splitlines()[0]
        key = getattr(error, "full_key", None) or ""
        raise ConfigError(f"{key}: {first_line}; it wants {valid.get(key, 'another type')}") from None


def _refuse_missing(schema: type, merged: DictConfig) -> None:
    """Raises ConfigError for the first required key that is absent or empty."""
    texts = {key.name: key.text for key in keys_of(schema)}
    for key in required_keys(schema):
        if OmegaConf.select(merged, key) in (None, "", []):
            raise ConfigError(f"{key}: missing; give {key}=… ({texts[key]})")


def _parse_override(key: str, value: str, valid: dict[str, str]) -> DictConfig:
    # The value of a text key is taken literally: a column named `null`, a path with `[` or a secret of digits is not YAML.
    if valid.get(key, "").startswith("str") or in_storage(key):
        part = OmegaConf.create({})
        OmegaConf.update(part, key, value)
        return part
    try:
        return OmegaConf.from_dotlist([f"{key}={value}"])
    except Exception as error:  # omegaconf does not wrap the exceptions of the YAML parser
        raise ConfigError(
            f"{key}={value}: not a YAML value ({str(error).splitlines()[0]}); put texts with special characters in quotes, and the word in "
            f'quotes of the shell: \'{key}=["a[0-9].json", "b"]\''
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


def _refuse_unknown(part: DictConfig, valid: dict[str, str], where: str, prefix: str = "") -> None:
    for name in part:
        key = f"{prefix}{name!s}"
        if key not in valid:
            leaves = [k for k, want in valid.items() if want != "section"]
            near = difflib.get_close_matches(key, leaves, n=1, cutoff=0.5)
            if not near:  # the right name without its section: kind=echo -> engine.kind
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
