"""Every configuration dataclass, one schema a job, and `load`: parsed once, at the door. Pure but for reading YAML files.

Inside the program there are only these frozen dataclasses; nobody sees an omegaconf object. Units stand in the names:
`_s` seconds, `_mb` 1e6 bytes, `_tokens`, `_rows`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from capsfusion_ray.errors import ConfigError

# ------------------------------------------------------------------------------------------------ the parts of a config


@dataclass(frozen=True)
class InputConfig:
    """Where the caption shards are."""

    path: Any = ""  # a file, a glob, a folder, any fsspec URL, or a list of them
    limit: int | None = None  # rows; a deterministic sample spread over all shards, which the full run reuses
    storage: dict[str, str] = field(default_factory=dict)  # fsspec options, e.g. {endpoint_url: http://…}

    def __post_init__(self) -> None:
        _check(self.limit is None or self.limit > 0, "input.limit", self.limit, "a positive number of rows")
        ok = isinstance(self.path, str) or (
            isinstance(self.path, list) and bool(self.path) and all(isinstance(p, str) for p in self.path)
        )
        _check(ok, "input.path", self.path, "a path or a list of paths")

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else list(self.path)


@dataclass(frozen=True)
class ColumnsConfig:
    """An explicit column map; an empty name falls back to the preset's."""

    raw: str = ""
    synthetic: str = ""
    url: str = ""
    reference: str = ""


@dataclass(frozen=True)
class SourceConfig:
    """How to read the shards as caption pairs."""

    preset: Literal["generic", "example_json", "capsfusion_120m", "laion_coco"] = "generic"
    format: Literal["auto", "parquet", "json", "jsonl", "csv", "tsv"] = "auto"  # auto: by file name
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    passthrough: list[str] | None = None  # columns carried along; null: the preset's choice


@dataclass(frozen=True)
class FilterConfig:
    """Rows left out by a column's value before anything is spent on them: counted by reason, not stored. null: off."""

    max_punsafe: float | None = None  # LAION's usual 0.5
    max_pwatermark: float | None = None  # LAION's usual 0.8
    min_similarity: float | None = None
    min_words: int | None = None  # of the raw caption
    min_characters: int | None = None  # of the raw caption


@dataclass(frozen=True)
class UnitConfig:
    """How large one unit of work, retry and commit is."""

    rows: int | None = None  # null: target_s times the speed expected of one actor
    target_s: float = 90.0
    captions_per_s: float | None = None  # of one actor; null: a guess by engine and device (see plan.py)

    def __post_init__(self) -> None:
        _check(self.rows is None or self.rows > 0, "unit.rows", self.rows, "a positive number of rows")
        _check(self.target_s > 0, "unit.target_s", self.target_s, "seconds above 0")


@dataclass(frozen=True)
class EngineConfig:
    """Which model writes, and on what."""

    kind: Literal["beam", "transformers", "echo"] = "beam"
    model: str = ""  # a hub id or a folder; empty: the embedded demo model
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA, float32 on a CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    slots: int | None = None  # captions decoded together; null: sized from free memory
    batch_size: int = 4  # captions a batch of engine.kind=transformers (4: the reference's)
    max_prompt_tokens: int = 256  # text_input_max_length in the reference config.yaml
    threads: int | None = None  # CPU threads of one actor; null: its share of the cores
    stall_s: float = 900.0  # a decode step (or batch) that takes longer ends the actor, and its units are tried again
    allow_demo_model: bool = False  # more than 100,000 rows with the embedded model
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _check(self.slots is None or self.slots > 0, "engine.slots", self.slots, "a positive number")
        _check(self.batch_size > 0, "engine.batch_size", self.batch_size, "a positive number")
        _check(self.stall_s > 0, "engine.stall_s", self.stall_s, "seconds above 0")
        _check(self.max_prompt_tokens >= 16, "engine.max_prompt_tokens", self.max_prompt_tokens, "at least 16")


@dataclass(frozen=True)
class DecodeConfig:
    """How a caption is searched for. Defaults are the reference's (transformers 4.28.1)."""

    num_beams: int = 3
    max_new_tokens: int = 80
    scoring: Literal["reference", "transformers"] = "reference"  # 4.28.1's padded full length, or 5.x's generated length
    length_penalty: float = 1.0
    no_repeat_ngram: int | None = None  # blocked in the generated text only; null: the model folder's wish, else 0 (off)

    def __post_init__(self) -> None:
        _check(1 <= self.num_beams <= 8, "decode.num_beams", self.num_beams, "1 to 8")
        _check(self.max_new_tokens >= 1, "decode.max_new_tokens", self.max_new_tokens, "at least 1")
        _check(
            self.no_repeat_ngram is None or self.no_repeat_ngram >= 0,
            "decode.no_repeat_ngram",
            self.no_repeat_ngram,
            "0 (off) or more",
        )


@dataclass(frozen=True)
class OutputConfig:
    """Where the dataset goes, and how it is cut into files."""

    path: str = ""
    target_file_mb: float = 256.0
    target_file_rows: int | None = None  # beside target_file_mb; whichever is reached first
    partition_by: str = "shard"  # groups of input shards; or the name of a passthrough column
    max_shard_groups: int = 256
    storage: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.target_file_mb > 0, "output.target_file_mb", self.target_file_mb, "megabytes above 0")
        _check(
            self.target_file_rows is None or self.target_file_rows > 0,
            "output.target_file_rows",
            self.target_file_rows,
            "a positive number of rows",
        )
        _check(1 <= self.max_shard_groups <= 1000, "output.max_shard_groups", self.max_shard_groups, "1 to 1000")


@dataclass(frozen=True)
class ClusterConfig:
    """How many actors, and what each may take."""

    min_actors: int = 1
    max_actors: int | None = None  # null: as many as the cluster's GPUs (or CPUs) hold
    gpus_per_actor: float | None = None  # null: 1 where the cluster has a GPU, else 0
    cpus_per_actor: float = 1.0
    units_in_flight: int = 2  # per actor, so that its slots never drain between units
    price_per_gpu_hour: float = 2.5  # USD; for the plan's estimate only
    address: str = "auto"  # auto: the cluster of `ray job submit`, else a local one started here; or ray://…

    def __post_init__(self) -> None:
        _check(self.min_actors >= 1, "cluster.min_actors", self.min_actors, "at least 1")
        ok = self.max_actors is None or self.max_actors >= self.min_actors
        _check(ok, "cluster.max_actors", self.max_actors, f"at least cluster.min_actors ({self.min_actors})")
        ok = self.gpus_per_actor is None or self.gpus_per_actor >= 0
        _check(ok, "cluster.gpus_per_actor", self.gpus_per_actor, "0 or more")
        _check(self.cpus_per_actor > 0, "cluster.cpus_per_actor", self.cpus_per_actor, "above 0")
        _check(self.units_in_flight >= 1, "cluster.units_in_flight", self.units_in_flight, "at least 1")


@dataclass(frozen=True)
class GateConfig:
    """One gate: from `threshold` on it acts, from `flag_from` on (where set) it flags. Every measure grows with the fault.

    "ignore", not "off": YAML reads a bare off as false.
    """

    action: Literal["reject", "flag", "ignore"] = "flag"
    threshold: float = 1.0
    flag_from: float | None = None

    def __post_init__(self) -> None:
        _check(self.threshold > 0, "gates.*.threshold", self.threshold, "above 0")
        ok = self.flag_from is None or 0 < self.flag_from < self.threshold
        _check(ok, "gates.*.flag_from", self.flag_from, f"above 0 and below the threshold ({self.threshold})")


PairPolicy = Literal["fuse", "flag", "keep_raw", "keep_synthetic", "reject"]
MissingPolicy = Literal["keep_raw", "keep_synthetic", "reject"]


def _gate(action: Literal["reject", "flag", "ignore"], threshold: float = 1.0, flag_from: float | None = None) -> Any:
    return field(default_factory=lambda: GateConfig(action, threshold, flag_from))


@dataclass(frozen=True)
class GatesConfig:
    """What is done about each fault; a field is named as its Reason. docs/gates.md has the measured rates."""

    # before the engine: what becomes of the pair. A policy that would keep the missing caption rejects.
    null_caption: MissingPolicy = "reject"
    empty_caption: MissingPolicy = "reject"
    boilerplate: PairPolicy = "keep_synthetic"  # raw is 'IMG_1234.jpg', 'thumbnail', a bare number or hash
    mismatched_pair: PairPolicy = "fuse"  # raw and synthetic share no content word: 35% of real pairs
    # after the engine, in the order in which the first rejecting one names the reason
    empty_output: GateConfig = _gate("reject")  # 1 where no word came out
    instruction_echo: GateConfig = _gate("reject", 2, 1)  # points: 2 talks about the task, 1 borrows a phrase of it
    repetition: GateConfig = _gate("reject", 0.3, 0.1)  # share of 4-grams seen before and not repeated by a source
    wrong_script: GateConfig = _gate("reject", 0.3)  # share of letters, or 1 where the language is neither source's
    concatenation: GateConfig = _gate("flag", 0.9)  # share of the words that are both sources pasted verbatim
    copy_of_one: GateConfig = _gate("flag", 0.9)  # share of the words that are one source verbatim, the other unused
    unsupported_number: GateConfig = _gate("reject", 1)  # numbers in neither source
    unsupported_name: GateConfig = _gate("flag", 1)  # capitalised words in neither source
    cut_off: GateConfig = _gate("reject", 2, 1)  # 2: begins inside a sentence, 1: stopped at max_new_tokens
    lost_entity: GateConfig = _gate("flag", 0.5)  # share of raw's names and numbers that are gone
    too_short: GateConfig = _gate("reject", 10, 3)  # words of the longer source per fused word
    too_long: GateConfig = _gate("reject", 8, 3)  # fused words per word of both sources


# ------------------------------------------------------------------------------------------------ one schema a job


@dataclass(frozen=True)
class FuseConfig:
    """jobs/fuse.py, and jobs/plan.py, which computes the same plan and writes nothing."""

    input: InputConfig = field(default_factory=InputConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    unit: UnitConfig = field(default_factory=UnitConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    gates: GatesConfig = field(default_factory=GatesConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    retry: str = ""  # fuse rejected rows again with these settings: `rejected`, or reasons separated by commas
    takeover: bool = False  # stop a driver that is at work on the same output, and go on in its place


@dataclass(frozen=True)
class VerifyConfig:
    """jobs/verify.py."""

    output: OutputConfig = field(default_factory=OutputConfig)
    deep: bool = False  # also read every row id back: each in its unit, in order, once


def _check(ok: bool, key: str, value: object, want: str) -> None:
    if not ok:
        raise ConfigError(f"{key}={value!r}: must be {want}")


# ------------------------------------------------------------------------------------------------ parsing and fingerprint

T = TypeVar("T")


def load(schema: type[T], argv: typing.Sequence[str]) -> T:
    """Merge YAML fragments left to right, then `key=value` overrides, into one frozen config.

    Raises ConfigError for a missing file, an unknown key (naming the nearest valid one) or a value of the wrong type.
    """
    merged: DictConfig = OmegaConf.create({})
    valid = _keys(schema)
    for argument in argv:
        key, equals, value = argument.partition("=")
        if argument.startswith("-"):
            raise ConfigError(f"{argument}: there are no flags; give YAML files first, then key=value (see docs/configuration.md)")
        if equals:
            part = _parse_override(key, value, valid)
        elif argument.endswith((".yaml", ".yml")):
            part = _read_yaml(argument)
        else:
            raise ConfigError(f"{argument}: neither a .yaml file nor key=value")
        _refuse_unknown(part, valid, argument)
        merged = typing.cast(DictConfig, OmegaConf.merge(merged, part))
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
    # A value of a text field is taken literally: a caption column named `null` or a path with `[` must not become YAML.
    if valid.get(key, "").startswith("str"):
        part = OmegaConf.create({})
        OmegaConf.update(part, key, value)
        return part
    try:
        return OmegaConf.from_dotlist([f"{key}={value}"])
    except Exception as error:  # omegaconf lets the YAML parser's own exceptions through
        raise ConfigError(f"{key}={value}: not a YAML value ({str(error).splitlines()[0]})") from None


def _read_yaml(path: str) -> DictConfig:
    if not Path(path).is_file():
        near = difflib.get_close_matches(path, [str(p) for p in Path("conf").rglob("*.yaml")], n=1, cutoff=0.4)
        raise ConfigError(f"{path}: no such file" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        part = OmegaConf.load(path)
    except Exception as error:  # YAML's own exceptions
        raise ConfigError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(part, DictConfig):
        raise ConfigError(f"{path}: the top level must be key: value pairs")
    return part


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
                raise ConfigError(f"{where}: {key} is a section; give one of its keys, such as {_first_below(key, valid)}")
            _refuse_unknown(value, valid, where, key + ".")


def _first_below(key: str, valid: dict[str, str]) -> str:
    return next(k for k in valid if k.startswith(key + "."))


def as_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain nested dicts, secrets (`*secret*`, `*key*`, `*token*` of storage options) masked."""

    def masked(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {k: masked(v, f"{name}.{k}") for k, v in value.items()}
        secret = ".storage." in name and any(word in name.rsplit(".", 1)[-1].lower() for word in ("secret", "key", "token", "password"))
        return "***" if secret and value else value

    return {k: masked(v, k) for k, v in dataclasses.asdict(config).items()}


def to_yaml(config: Any) -> str:
    """The resolved config, as saved with the output; secrets masked."""
    return OmegaConf.to_yaml(OmegaConf.create(as_dict(config)))


def fingerprint(parts: dict[str, Any]) -> str:
    """A short stable hash of JSON-able values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
