"""Join a table of raw captions with a table of synthetic ones into one that jobs/fuse.py reads: jobs/pair.py.

This file surveys the tables and keeps the output's promises; the two passes are in join.py, the rules in pairing.py.

    <output>/part-00017.parquet     the pairs of one bucket: image_url, laion_2b, laion_coco, the columns carried along
    <output>/_pair/settings.json    what decides the parts; another pairing is refused
    <output>/_pair/exchange/        the rows on their way, as large as both tables' columns together; deleted at the end
    <output>/_pair/buckets/         the audit of each bucket that is joined; deleted at the end
    <output>/_pair/audit.json       what became of every row of both tables; written last: that it exists is the commit

A part's name and bytes follow from the input and the settings alone, and a killed run is continued by the same command.
Memory: a task holds 500,000 rows three times over, whatever the tables' size; only a key that millions of rows share makes a
larger bucket.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import pyarrow as pa

from capsfusion_ray.config import (
    ClusterConfig,
    ColumnsConfig,
    FilterConfig,
    InputConfig,
    SourceConfig,
    fingerprint,
    section,
    setting,
)
from capsfusion_ray.core.columns import RESERVED, URL
from capsfusion_ray.dataset.layout import LEASE
from capsfusion_ray.dataset.lease import Lease
from capsfusion_ray.errors import ConfigError, SourceError
from capsfusion_ray.pairing.ray_join import Join, run_join, sweep
from capsfusion_ray.pairing.rules import RAW_SIDE, SIDES, SYNTHETIC_SIDE, Audit, SideAudit
from capsfusion_ray.pairing.shuffle_files import Table
from capsfusion_ray.run import cluster
from capsfusion_ray.sources import ReadSpec, Shard, discover, frozen_schema, without_foreign
from capsfusion_ray.sources.presets import PRESETS, did_you_mean
from capsfusion_ray.storage import Store

log = logging.getLogger(__name__)
SETTINGS, AUDIT = "_pair/settings.json", "_pair/audit.json"
BUCKET_ROWS = 500_000  # of both tables, on average: about 120 MB of captions, URLs and keys


@dataclass(frozen=True)
class TableConfig:
    """One of the two tables: its shards, and which of their columns is what."""

    path: Any = setting("", "a file, a glob, a folder, any fsspec URL, or a list of these", common=True)
    caption: str = setting("", "column of the caption; empty: the first known name that the table has", common=True)
    key: str = setting("", "column of the key, text or integers; empty: the URL", common=True)
    url: str = setting("", "column of the image URL; empty: the first known name, if any", common=True)
    passthrough: list[str] = setting([], "further columns that are copied to the output", common=True)
    format: Literal["auto", "parquet", "json", "jsonl", "csv", "tsv"] = setting("auto", "auto: by the file name")
    storage: dict[str, str] = setting({}, "fsspec options, e.g. {endpoint_url: http://…}")


@dataclass(frozen=True)
class PairOutputConfig:
    """Where the paired table goes."""

    path: str = setting("", "a folder or a URL", common=True)
    storage: dict[str, str] = setting({}, "fsspec options, e.g. {endpoint_url: http://…}")


@dataclass(frozen=True)
class PairConfig:
    """jobs/pair.py."""

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
                    f"passthrough: {name!r} starts with '_' or is named twice; rename it in its table, or leave it out"
                )


def survey(side: str, table: TableConfig, normalise: str) -> Table:
    """List a table's shards, look into each, settle its columns. Raises SourceError naming the table and what it lacks."""
    plain = SourceConfig(format=table.format)
    shards = tuple(discover(InputConfig(table.path, storage=table.storage), plain))
    names = _columns_of(side, table, shards)
    _check_named(side, table, shards)

    def pick(role: str, given: str, known: Sequence[str]) -> str:
        found = given or next((name for name in known if name in names), "")
        if not found and role != "url":
            raise SourceError(
                f"{side}.path={table.path}: no column is known as its {role}; it has {', '.join(names)}; set {side}.{role}=NAME"
            )
        return found

    url = pick("url", table.url, PRESETS["generic"].url)
    columns = {
        "caption": pick(
            "caption", table.caption, PRESETS["generic"].raw if side == RAW_SIDE else PRESETS["generic"].synthetic
        ),
        "key": pick("key", table.key, [url] if url else []),
        "url": url,
    }
    # One table has one caption: it plays both roles for the reader, which decodes it once.
    roles = ColumnsConfig(raw=columns["caption"], synthetic=columns["caption"], url=url)
    as_key = [] if columns["key"] == url else [columns["key"]]
    source = replace(plain, columns=roles, passthrough=list(dict.fromkeys([*as_key, *table.passthrough])))
    shards = without_foreign(shards, source, FilterConfig())
    _columns_of(side, table, shards)
    for shard in shards:
        if shard.error:
            log.warning("%s: unreadable shard %s: %s", side, shard.path, shard.error)
    schema = frozen_schema(shards, source, FilterConfig())
    key = URL if columns["key"] == url else columns["key"]
    type_ = schema.field(key).type
    if not (pa.types.is_string(type_) or (pa.types.is_integer(type_) and normalise == "none")):
        why = (
            "a key must be text or integers (64-bit numbers lose digits in floats)"
            if normalise == "none"
            else "normalise=url is for text"
        )
        raise SourceError(f"{side}.key={columns['key']}: it is {type_}; {why}")
    return Table(
        side, shards, ReadSpec(schema, source, FilterConfig(), table.storage), key, columns, tuple(table.passthrough)
    )


def _columns_of(side: str, table: TableConfig, shards: Sequence[Shard]) -> list[str]:
    """The columns of the first shard that has rows. Raises SourceError where no row is readable."""
    for shard in shards:
        if shard.schema is not None and shard.rows:
            return list(shard.schema.names)
    found = "; ".join(f"{shard.path}: {shard.error}" for shard in shards[:3] if shard.error) or "no rows"
    raise SourceError(f"{side}.path={table.path}: no row is readable there ({len(shards)} files; {found})")


def _check_named(side: str, table: TableConfig, shards: Sequence[Shard]) -> None:
    """Raises SourceError for a column that was named and is not in every shard."""
    named = [
        ("caption", table.caption),
        ("key", table.key),
        ("url", table.url),
        *(("passthrough", name) for name in table.passthrough),
    ]
    for shard in shards:
        if shard.schema is None or not shard.rows:
            continue
        present = shard.schema.names
        for role, name in named:
            if name and name not in present and name not in RESERVED:
                has = f"{', '.join(present)}{did_you_mean(name, present)}"
                raise SourceError(f"{side}.{role}={name}: {shard.path} has no such column; it has {has}")


def pair(cfg: PairConfig) -> dict[str, Any]:
    """Survey both tables, join them, write the parts and last the audit, which is returned."""
    began = time.monotonic()
    tables = [survey(RAW_SIDE, cfg.raw, cfg.normalise), survey(SYNTHETIC_SIDE, cfg.synthetic, cfg.normalise)]
    partitions = cfg.partitions or min(-(-sum(table.rows for table in tables) // BUCKET_ROWS), 10_000)
    store = Store(cfg.output.path, cfg.output.storage)
    with Lease(store, cfg.takeover) as lease:
        return _pair(cfg, tables, partitions, store, lease, began)


def _pair(
    cfg: PairConfig, tables: Sequence[Table], partitions: int, store: Store, lease: Lease, began: float
) -> dict[str, Any]:
    _claim(store, settings(cfg, tables, partitions))
    if store.exists(AUDIT):
        done: dict[str, Any] = json.loads(store.get(AUDIT))
        refuse_duplicates(cfg, Audit.from_dict(done))
        sweep(store)  # a kill after the audit leaves it to us
        log.info("nothing is left to do: %s holds this pairing", cfg.output.path)
        return done
    cluster.connect(ClusterConfig(address=cfg.address))
    try:
        audit = run_join(
            Join({table.side: table for table in tables}, partitions, cfg.normalise, cfg.duplicates, store)
        )
    finally:
        cluster.disconnect()
    lease.check()
    audit.check({table.side: table.rows for table in tables})
    refuse_duplicates(cfg, audit)
    if audit.raw.matched == 0:
        sweep(store)
        store.delete([SETTINGS])  # no part was written: other keys may be tried with the same output
        raise SourceError(
            f"no key of raw ({tables[0].columns['key']}, e.g. {list(audit.raw.unmatched_keys)}) is one of synthetic "
            f"({tables[1].columns['key']}, e.g. {list(audit.synthetic.unmatched_keys)}); set raw.key and synthetic.key, or normalise=url"
        )
    report: dict[str, Any] = {"pairs": audit.raw.matched}
    for table in tables:
        counts: SideAudit = getattr(audit, table.side)
        report[table.side] = {
            "rows": table.rows,
            "matched_share": round(counts.matched / table.rows, 4),
            "columns": table.columns,
            "shards": len(table.shards),
            "unreadable_shards": {shard.path: shard.error for shard in table.shards if shard.error},
            **asdict(counts),
        }
    report |= {"partitions": partitions, "buckets": audit.buckets, "largest_bucket": audit.largest_bucket}
    report |= {"seconds": round(time.monotonic() - began, 2), "output": cfg.output.path}
    store.put(AUDIT, json.dumps(report, indent=1, ensure_ascii=False).encode())
    sweep(store)
    return report


def settings(cfg: PairConfig, tables: Sequence[Table], partitions: int) -> dict[str, Any]:
    """What decides the parts. Not `duplicates`: a part is the same under both policies, or is not written."""
    decides: dict[str, Any] = {"normalise": cfg.normalise, "partitions": partitions}
    for table in tables:
        decides |= {f"{table.side}.{role}": name for role, name in table.columns.items()}
        decides[f"{table.side}.passthrough"] = list(
            table.carried
        )  # the key may be among them, and then the schema does not tell
        decides[f"{table.side}.schema"] = str(table.read.schema)
        decides[f"{table.side}.path"] = fingerprint(
            {shard.path: [shard.content_key, shard.rows, i] for i, shard in enumerate(table.shards)}
        )
    return decides


def _claim(store: Store, wanted: dict[str, Any]) -> None:
    """Raises ConfigError where the output holds the parts of another pairing, naming what differs, or anything else."""
    if not store.exists(SETTINGS):
        found = [file for file in store.list() if file.path != LEASE]
        if found:
            raise ConfigError(
                f"output.path={store.root}: not empty, and no pairing of ours (it has {found[0].path}); choose a new one"
            )
        if store.put_if_absent(SETTINGS, json.dumps(wanted, indent=1).encode()):
            return
    held = json.loads(store.get(SETTINGS))
    changed = [
        f"{key} was {held.get(key)!r}, now {wanted.get(key)!r}" for key in wanted if held.get(key) != wanted[key]
    ]
    if changed:
        raise ConfigError(
            f"output.path={store.root}: holds another pairing: {'; '.join(changed)}; choose a new output.path, or delete it"
        )


def refuse_duplicates(cfg: PairConfig, audit: Audit) -> None:
    if cfg.duplicates == "refuse" and (audit.raw.duplicates or audit.synthetic.duplicates):
        found = "; ".join(
            f"{side}: {counts.duplicates} rows ({counts.conflicting} with another caption), e.g. {list(counts.duplicate_keys)}"
            for side in SIDES
            if (counts := getattr(audit, side)).duplicates
        )
        raise SourceError(
            f"duplicates=refuse: rows whose key an earlier row has: {found}; give duplicates=first, or clean the table"
        )
