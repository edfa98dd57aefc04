"""The settings of the pair job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from capsfusion_ray.config import section, setting
from capsfusion_ray.errors import ConfigError


@dataclass(frozen=True)
class TableConfig:
    """One of the two tables: where its shards are, and what their columns mean."""

    path: Any = setting("", "a file, a glob, a folder, any fsspec URL, or a list of these", common=True)
    caption: str = setting("", "column of the caption; empty: the first known name that the table has", common=True)
    key: str = setting("", "column of the key, text or integers; empty: the URL", common=True)
    url: str = setting("", "column of the image URL; empty: the first known name, if any", common=True)
    passthrough: list[str] = setting([], "further columns that are copied to the output", common=True)
    format: str = setting("auto", "parquet, json (an array), jsonl, csv or tsv; auto: by the file name")
    storage: dict[str, str] = setting({}, "fsspec options, e.g. {endpoint_url: http://…}")


@dataclass(frozen=True)
class PairOutputConfig:
    """Where the paired table goes."""

    path: str = setting("", "a folder or a URL", common=True)
    storage: dict[str, str] = setting({}, "fsspec options, e.g. {endpoint_url: http://…}")


@dataclass(frozen=True)
class PairConfig:
    """The pair job."""

    raw: TableConfig = section(TableConfig, required=["path"])
    synthetic: TableConfig = section(TableConfig, required=["path"])
    output: PairOutputConfig = section(PairOutputConfig, required=["path"])
    normalise: Literal["none", "url"] = setting(
        "none", "url: ignore scheme, case of the host, default port and fragment when keys are compared", common=True
    )
    duplicates: Literal["first", "refuse"] = setting(
        "first", "of several rows with one key take the first by shard and row, or stop", common=True
    )
    partitions: int | None = setting(None, "buckets of the join, and files of the output; null: one per 500,000 rows")
    takeover: bool = setting(False, "stop another driver that writes to the same output, and continue in its place")
    address: str = setting(
        "auto",
        "auto: the cluster of `ray job submit`, else a local one that is started here; or ray://host:10001",
        common=True,
    )

    def __post_init__(self) -> None:
        if self.partitions is not None and not 1 <= self.partitions <= 10_000:
            raise ConfigError(f"partitions={self.partitions}: must be 1 to 10000")
        carried = [*self.raw.passthrough, *self.synthetic.passthrough]
        for name in carried:
            if name.startswith("_") or carried.count(name) > 1:
                raise ConfigError(
                    f"passthrough: {name!r} starts with '_' or occurs twice; rename it in its table, or leave it out"
                )
