"""Settings of the input: where the shards are, what their columns mean, which rows are left out, how large a unit is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from capsfusion_ray.config.check import check
from capsfusion_ray.config.setting import section, setting


@dataclass(frozen=True)
class InputConfig:
    """Where the caption shards are."""

    path: Any = setting("", "a file, a glob, a folder, any fsspec URL, or a list of these", common=True)
    limit: int | None = setting(
        None, "fuse only this many rows, spread evenly over all shards; a later run without it reuses them", common=True
    )
    storage: dict[str, str] = setting({}, "fsspec options, e.g. {endpoint_url: http://…}", common=True)

    def __post_init__(self) -> None:
        check(self.limit is None or self.limit > 0, "input.limit", self.limit, "a positive number of rows")
        ok = isinstance(self.path, str) or (
            isinstance(self.path, list) and bool(self.path) and all(isinstance(p, str) for p in self.path)
        )
        check(ok, "input.path", self.path, "a path or a list of paths")

    @property
    def paths(self) -> list[str]:
        """`path` as a list."""
        return [self.path] if isinstance(self.path, str) else list(self.path)


@dataclass(frozen=True)
class ColumnsConfig:
    """The columns that the captions are in; an empty name leaves the choice to the preset."""

    raw: str = setting("", "column of the raw caption (alt text)", common=True)
    synthetic: str = setting("", "column of the synthetic caption", common=True)
    url: str = setting("", "column of the image URL")
    reference: str = setting("", "column of a published fused caption, carried along to compare with")


@dataclass(frozen=True)
class SourceConfig:
    """How the shards are read as caption pairs."""

    preset: Literal["generic", "example_json", "capsfusion_120m", "laion_coco"] = setting(
        "generic", "which columns are which; generic: the first known name that the input has", common=True
    )
    format: str = setting("auto", "parquet, json (an array), jsonl, csv or tsv; auto: by the file name")
    columns: ColumnsConfig = section(ColumnsConfig)
    passthrough: list[str] | None = setting(
        None, "further columns that are copied to the output; null: those of the preset", common=True
    )


@dataclass(frozen=True)
class FilterConfig:
    """Rows that are left out before any engine sees them. They are counted by reason and not stored. null: no filter."""

    max_punsafe: float | None = setting(
        None, "leave out rows with punsafe from this value on; LAION's usual 0.5", common=True
    )
    max_pwatermark: float | None = setting(
        None, "leave out rows with pwatermark from this value on; LAION's usual 0.8", common=True
    )
    min_similarity: float | None = setting(None, "leave out rows with a smaller similarity", common=True)
    min_words: int | None = setting(None, "leave out rows whose raw caption has fewer words")
    min_characters: int | None = setting(None, "leave out rows whose raw caption has fewer characters")


@dataclass(frozen=True)
class UnitConfig:
    """How large a unit of work is: the rows that are read, fused, committed and retried together."""

    rows: int | None = setting(None, "null: target_s times the expected speed of one actor, at most 50,000")
    target_s: float = setting(90.0, "seconds that one actor shall take for a unit")
    captions_per_s: float | None = setting(
        None, "expected speed of one actor; null: a guess by engine and device (core/cost_model.py)"
    )

    def __post_init__(self) -> None:
        check(self.rows is None or self.rows > 0, "unit.rows", self.rows, "a positive number of rows")
        check(self.target_s > 0, "unit.target_s", self.target_s, "seconds above 0")
