"""Look at one of the two tables before anything starts: its shards, its columns, and whether its key can be compared."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from capsfusion_ray.config import ColumnsConfig, FilterConfig, InputConfig, SourceConfig
from capsfusion_ray.core.columns import RESERVED, URL
from capsfusion_ray.errors import SourceError
from capsfusion_ray.pairing.config import TableConfig
from capsfusion_ray.pairing.shuffle_files import Table
from capsfusion_ray.pairing.shuffle_rows import RAW_SIDE
from capsfusion_ray.sources import ReadSpec, Shard, discover, frozen_schema, without_foreign
from capsfusion_ray.sources.presets import PRESETS, did_you_mean

log = logging.getLogger(__name__)


def survey(side: str, table: TableConfig, normalise: str) -> Table:
    """List the shards of a table, read their footers, and choose its columns.

    `side`: raw or synthetic, for errors. Raises SourceError naming the table and what it lacks.
    """
    plain = SourceConfig(format=table.format)
    shards = tuple(discover(InputConfig(table.path, storage=table.storage), plain))
    names = _columns_of(side, table, shards)
    _check_given(side, table, shards)
    columns = _choose_columns(side, table, names)
    # A table has one caption. It is given to the reader as both captions, and decoded once.
    roles = ColumnsConfig(raw=columns["caption"], synthetic=columns["caption"], url=columns["url"])
    as_key = [] if columns["key"] == columns["url"] else [columns["key"]]
    source = replace(plain, columns=roles, passthrough=list(dict.fromkeys([*as_key, *table.passthrough])))
    shards = without_foreign(shards, source, FilterConfig())
    _columns_of(side, table, shards)
    for shard in shards:
        if shard.error:
            log.warning("%s: unreadable shard %s: %s", side, shard.path, shard.error)
    schema = frozen_schema(shards, source, FilterConfig())
    key = columns["key"] if as_key else URL
    _check_key(f"{side}.key={columns['key']}", schema.field(key).type, normalise)
    read = ReadSpec(schema, source, FilterConfig(), table.storage)
    return Table(side, shards, read, key, columns, tuple(table.passthrough))


def _choose_columns(side: str, table: TableConfig, names: Sequence[str]) -> dict[str, str]:
    """The column of the caption, the key and the URL: the one that was given, else the first known name in `names`.

    Raises SourceError for a caption or a key that has none.
    """

    def choose(role: str, given: str, known: Sequence[str]) -> str:
        found = given or next((name for name in known if name in names), "")
        if not found and role != "url":
            raise SourceError(
                f"{side}.path={table.path}: no column is known as its {role}; it has {', '.join(names)}; set {side}.{role}=NAME"
            )
        return found

    known = PRESETS["generic"]
    url = choose("url", table.url, known.url)
    caption = choose("caption", table.caption, known.raw if side == RAW_SIDE else known.synthetic)
    return {"caption": caption, "key": choose("key", table.key, [url] if url else []), "url": url}


def _columns_of(side: str, table: TableConfig, shards: Sequence[Shard]) -> list[str]:
    """The columns of the first shard that has rows. Raises SourceError if no row is readable."""
    for shard in shards:
        if shard.schema is not None and shard.rows:
            return list(shard.schema.names)
    found = "; ".join(f"{shard.path}: {shard.error}" for shard in shards[:3] if shard.error) or "no rows"
    raise SourceError(f"{side}.path={table.path}: no row is readable there ({len(shards)} files; {found})")


def _check_given(side: str, table: TableConfig, shards: Sequence[Shard]) -> None:
    """Raises SourceError for a column that the config names and a shard lacks."""
    given = [("caption", table.caption), ("key", table.key), ("url", table.url)]
    given += [("passthrough", name) for name in table.passthrough]
    for shard in shards:
        if shard.schema is None or not shard.rows:
            continue
        present = shard.schema.names
        for role, name in given:
            if name and name not in present and name not in RESERVED:
                has = f"{', '.join(present)}{did_you_mean(name, present)}"
                raise SourceError(f"{side}.{role}={name}: {shard.path} has no such column; it has {has}")


def _check_key(shown: str, type_: pa.DataType, normalise: str) -> None:
    """Raises SourceError for a key that is neither text nor integers; `shown` names it."""
    if pa.types.is_string(type_) or (pa.types.is_integer(type_) and normalise == "none"):
        return
    why = "a key must be text or integers (64-bit numbers lose digits in floats)"
    raise SourceError(f"{shown}: it is {type_}; {why if normalise == 'none' else 'normalise=url is for text'}")
