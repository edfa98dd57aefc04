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
            isinstance(self.path, list) and self.path and all(isinstance(p, str) for p in self.path)
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
    allow_demo_model: bool = False  # more than 100,000 rows with the embedded model
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _check(self.slots is None or self.slots > 0, "engine.slots", self.slots, "a positive number")
        _check(self.batch_size > 0, "engine.batch_size", self.batch_size, "a positive number")
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
    partition_by: list[str] = field(default_factory=lambda: ["shard"])  # "shard" (groups of input shards) or columns
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
        _check(len(self.partition_by) == 1, "output.partition_by", self.partition_by, "exactly one name")


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
    output: OutputConfig = field(default_factory=OutputConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def _check(ok: bool, key: str, value: object, want: str) -> None:
    if not ok:
        raise ConfigError(f"{key}={value!r}: must be {want}")
