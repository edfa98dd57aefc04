"""The columns of known datasets. Pure: knows names, and no files.

| preset | raw | synthetic | url | reference | passthrough |
| --- | --- | --- | --- | --- | --- |
| capsfusion_120m | laion_2b | laion_coco | image_url | capsfusion | - |
| example_json | laion_2b | laion_coco | - | capsfusion_official, capsfuion_official | - |
| laion_coco | TEXT | top_caption | URL | - | WIDTH, HEIGHT, similarity, hash, pwatermark, punsafe |
| generic | the first known name that the input has | | | | - |

An explicit `source.columns` wins over the preset, and `source.passthrough` replaces the preset's choice. `generic` has no
passthrough columns by itself, because the columns of an unknown table may be huge, private or different from shard to shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from capsfusion_ray.config import SourceConfig
from capsfusion_ray.core.columns import INVALID, RAW, REFERENCE, RESERVED, SYNTHETIC, URL
from capsfusion_ray.core.types import FilterReason
from capsfusion_ray.errors import SourceError


@dataclass(frozen=True, slots=True)
class Preset:
    """The names that each role may have, best first. `url_needed`: a shard without a URL column is refused."""

    raw: tuple[str, ...]
    synthetic: tuple[str, ...]
    url: tuple[str, ...] = ()
    reference: tuple[str, ...] = ()
    passthrough: tuple[str, ...] = ()
    url_needed: bool = False


PRESETS = {
    "capsfusion_120m": Preset(("laion_2b",), ("laion_coco",), ("image_url",), ("capsfusion",), url_needed=True),
    "example_json": Preset(
        ("laion_2b",), ("laion_coco",), ("image_url",), ("capsfusion_official", "capsfuion_official")
    ),  # the second is the spelling of the published file
    "laion_coco": Preset(
        ("TEXT",),
        ("top_caption",),
        ("URL",),
        passthrough=("WIDTH", "HEIGHT", "similarity", "hash", "pwatermark", "punsafe"),
        url_needed=True,
    ),
    "generic": Preset(
        raw=("laion_2b", "raw", "raw_caption", "alt_text", "alt", "TEXT", "text", "org_caption", "caption"),
        synthetic=("laion_coco", "synthetic", "synthetic_caption", "top_caption", "re_caption", "blip_caption"),
        url=("image_url", "URL", "url"),
        reference=("reference",),
    ),
}

# The names of LAION, which its derivatives have kept.
FILTER_COLUMNS = {
    FilterReason.PUNSAFE: "punsafe",
    FilterReason.PWATERMARK: "pwatermark",
    FilterReason.SIMILARITY: "similarity",
}


@dataclass(frozen=True, slots=True)
class ColumnMap:
    """The column of each role in one shard. `url` and `reference` are empty if the shard has none."""

    raw: str
    synthetic: str
    url: str
    reference: str


def fitting(present: Sequence[str]) -> str:
    """A hint for a message: the presets whose columns are all present."""
    fits = [
        name
        for name, preset in PRESETS.items()
        if all(
            any(n in present for n in names)
            for names in (preset.raw, preset.synthetic, *([preset.url] if preset.url_needed else []))
        )
    ]
    return f"; {' and '.join(fits)} would do" if fits else ""


def column_map(source: SourceConfig, columns: Iterable[str], shard: str) -> ColumnMap:
    """The columns of one shard by role. Raises SourceError naming `shard`, what is missing and the columns it has."""
    preset, explicit, present = PRESETS[source.preset], source.columns, list(columns)

    def pick(role: str, given: str, names: tuple[str, ...], needed: bool) -> str:
        if given:
            names, needed = (given,), True
        found = next((name for name in names if name in present), "")
        if given and not found:
            has = f"{', '.join(present) or 'none'}{did_you_mean(given, present)}"
            raise SourceError(f"{shard}: no column {given!r}, which source.columns.{role} names; it has: {has}")
        if needed and not found:
            wanted = " or ".join(repr(name) for name in names)
            has = ", ".join(present) or "none"
            other = "synthetic" if role == "raw" else "raw"
            pairing = ""
            if (
                not fitting(present)
                and role in ("raw", "synthetic")
                and any(name in present for name in getattr(preset, other))
            ):
                pairing = (
                    f". Only its {other} captions are known: if the {role} ones are in another table, join the two first "
                    "(capsfusion pair, by URL or a key); a fusion needs both in one row"
                )
            raise SourceError(
                f"{shard}: no column {wanted} to be the {role}{' caption' if role != 'url' else ''}; it has: {has}{pairing}. "
                f"If one of these is, set source.columns.{role}=NAME, or another source.preset (now {source.preset}{fitting(present)})"
            )
        return found

    return ColumnMap(
        raw=pick("raw", explicit.raw, preset.raw, True),
        synthetic=pick("synthetic", explicit.synthetic, preset.synthetic, True),
        url=pick("url", explicit.url, preset.url, preset.url_needed),
        reference=pick("reference", explicit.reference, preset.reference, False),
    )


def did_you_mean(name: str, present: Iterable[str]) -> str:
    """A hint to append for a column that is missing; empty if no column has a similar name."""
    near = get_close_matches(name, present, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def passthrough_columns(source: SourceConfig) -> tuple[tuple[str, ...], bool]:
    """The passthrough columns, and whether every shard must have them, which is so if the user named them.

    Raises SourceError for names that the output uses itself.
    """
    if source.passthrough is None:
        return PRESETS[source.preset].passthrough, False
    for name in source.passthrough:
        if name in RESERVED or name in (REFERENCE, INVALID):
            role = {URL: "url", RAW: "raw", SYNTHETIC: "synthetic", REFERENCE: "reference"}.get(name)
            way_out = (
                f"map it with source.columns.{role} instead" if role else "rename it in the input, or leave it out"
            )
            raise SourceError(f"source.passthrough: {name!r} is a column of the output itself; {way_out}")
    if len(set(source.passthrough)) < len(source.passthrough):
        raise SourceError(f"source.passthrough={source.passthrough}: give each column once")
    return tuple(source.passthrough), True
