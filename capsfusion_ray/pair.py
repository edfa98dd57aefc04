"""Join a table of raw captions with a table of synthetic ones into one that jobs/fuse.py reads: jobs/pair.py.

The graph, on one screen: read both tables -> shuffle by bucket (a hash of the key) -> join each bucket and write it. The rules
are in pairing.py. Ray's own Dataset.join is not used: it needs polars, keeps every combination of duplicates, and a full outer
join would be needed to count what found no partner.

    <output>/part-00017.parquet     the pairs of one bucket: image_url, laion_2b, laion_coco, the columns carried along
    <output>/_pair/settings.json    what decides the parts; another pairing is refused
    <output>/_pair/audit.json       what became of every row of both tables; written last: that it exists is the commit

A part's name and bytes follow from the input and the settings alone, so a killed run is repeated by the same command.
Memory: a read task holds one block of rows, a shuffle task 256 MB of blocks, a join task one partition of the shuffle (some
buckets: of 250,000 rows on average, about four of them at worst) three times over. A key that millions of rows share is one
bucket. Ray spills what its object store cannot hold to disk.
"""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import DataContext, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from capsfusion_ray import cluster
from capsfusion_ray.config import ClusterConfig, ColumnsConfig, FilterConfig, InputConfig, SourceConfig, fingerprint
from capsfusion_ray.errors import ConfigError, SourceError
from capsfusion_ray.pairing import (
    BUCKET,
    RAW_SIDE,
    SIDES,
    SYNTHETIC_SIDE,
    Audit,
    SideAudit,
    exchange_schema,
    join_bucket,
    read_spans,
    to_exchange,
)
from capsfusion_ray.presets import PRESETS
from capsfusion_ray.rows import URL
from capsfusion_ray.sources import ReadSpec, Shard, discover, frozen_schema, iter_units
from capsfusion_ray.storage import Store

log = logging.getLogger(__name__)
SETTINGS, AUDIT = "_pair/settings.json", "_pair/audit.json"
BUCKET_ROWS = 250_000  # of both tables, on average: about 60 MB of captions and URLs
TASK_ROWS, BLOCK_ROWS = 500_000, 65_536  # of one read task, and of one block it yields
SHUFFLE_BATCH_BYTES = 256_000_000  # Ray's default is 1 GiB a shuffle task
READ_CPUS, JOIN_CPUS = 0.5, 1.0
ROW_GROUP_ROWS = 16_384


@dataclass(frozen=True)
class TableConfig:
    """One of the two tables: its shards, and which of their columns is what."""

    path: Any = ""  # a file, a glob, a folder, any fsspec URL, or a list of them
    caption: str = ""  # empty: the first known name that the table has
    key: str = ""  # text or integers; empty: the URL
    url: str = ""  # empty: the first known name, if any
    passthrough: list[str] = field(default_factory=list)  # columns carried along
    format: Literal["auto", "parquet", "json", "jsonl", "csv", "tsv"] = "auto"  # auto: by file name
    storage: dict[str, str] = field(default_factory=dict)  # fsspec options, e.g. {endpoint_url: http://…}


@dataclass(frozen=True)
class PairOutputConfig:
    """Where the paired table goes."""

    path: str = ""
    storage: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PairConfig:
    """jobs/pair.py."""

    raw: TableConfig = field(default_factory=TableConfig)
    synthetic: TableConfig = field(default_factory=TableConfig)
    output: PairOutputConfig = field(default_factory=PairOutputConfig)
    normalise: Literal["none", "url"] = (
        "none"  # url: keys that differ in scheme, host case, default port or fragment are one
    )
    duplicates: Literal["first", "refuse"] = "first"  # of rows with one key: take the first by shard and row, or stop
    partitions: int | None = None  # buckets of the join, and files; null: one a 250,000 rows
    address: str = "auto"  # auto: the cluster of `ray job submit`, else a local one started here; or ray://…

    def __post_init__(self) -> None:
        if self.partitions is not None and not 1 <= self.partitions <= 10_000:
            raise ConfigError(f"partitions={self.partitions}: must be 1 to 10000")
        carried = [*self.raw.passthrough, *self.synthetic.passthrough]
        for name in carried:
            if name.startswith("_") or carried.count(name) > 1:
                raise ConfigError(
                    f"passthrough: {name!r} starts with '_' or is named twice; rename it in its table, or leave it out"
                )


@dataclass(frozen=True)
class Table:
    """One side, surveyed: what is read of which shards, and how."""

    side: str
    shards: tuple[Shard, ...]
    read: ReadSpec
    key: str  # the key's name in `read.schema`
    columns: dict[str, str]  # role -> the column that plays it
    carried: tuple[str, ...]

    @property
    def readable(self) -> list[Shard]:
        return [shard for shard in self.shards if shard.rows]

    @property
    def rows(self) -> int:
        return sum(shard.rows or 0 for shard in self.shards)


def survey(side: str, table: TableConfig, normalise: str) -> Table:
    """List a table's shards, look into each, settle its columns. Raises SourceError naming the table and what it lacks."""
    if not table.path:
        raise ConfigError(f"{side}.path: missing; give {side}.path=<folder or URL>")
    plain = SourceConfig(format=table.format)
    shards = tuple(discover(InputConfig(table.path, storage=table.storage), plain))
    for shard in shards:
        if shard.error:
            log.warning("%s: unreadable shard %s: %s", side, shard.path, shard.error)
    names = next((shard.schema.names for shard in shards if shard.schema is not None and shard.rows), None)
    if names is None:
        raise SourceError(f"{side}.path={table.path}: no row is readable there ({len(shards)} files)")

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


def pair(cfg: PairConfig) -> dict[str, Any]:
    """Survey both tables, join them, write the parts and last the audit, which is returned."""
    began = time.monotonic()
    if not cfg.output.path:
        raise ConfigError("output.path: missing; give output.path=<folder or URL>")
    tables = [survey(RAW_SIDE, cfg.raw, cfg.normalise), survey(SYNTHETIC_SIDE, cfg.synthetic, cfg.normalise)]
    partitions = cfg.partitions or min(-(-sum(table.rows for table in tables) // BUCKET_ROWS), 10_000)
    store = Store(cfg.output.path, cfg.output.storage)
    _claim(store, settings(cfg, tables, partitions))
    if store.exists(AUDIT):
        done: dict[str, Any] = json.loads(store.get(AUDIT))
        refuse_duplicates(cfg, Audit.from_dict(done))
        log.info("nothing is left to do: %s holds this pairing", cfg.output.path)
        return done
    cluster.connect(ClusterConfig(address=cfg.address))
    try:
        audit = sum(run_join(tables, partitions, cfg.normalise, cfg.duplicates, store), Audit())
    finally:
        cluster.disconnect()
    audit.check({table.side: table.rows for table in tables})
    refuse_duplicates(cfg, audit)
    if audit.raw.matched == 0:
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
    return report


def settings(cfg: PairConfig, tables: Sequence[Table], partitions: int) -> dict[str, Any]:
    """What decides the parts. Not `duplicates`: a part is the same under both policies, or is not written."""
    decides: dict[str, Any] = {"normalise": cfg.normalise, "partitions": partitions}
    for table in tables:
        decides |= {f"{table.side}.{role}": name for role, name in table.columns.items()}
        decides[f"{table.side}.schema"] = str(table.read.schema)
        decides[f"{table.side}.path"] = fingerprint(
            {shard.path: [shard.content_key, shard.rows, i] for i, shard in enumerate(table.shards)}
        )
    return decides


def _claim(store: Store, wanted: dict[str, Any]) -> None:
    """Raises ConfigError where the output holds the parts of another pairing, naming what differs, or anything else."""
    if not store.exists(SETTINGS):
        found = store.list()
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


# ------------------------------------------------------------------------------------------------------------ the graph


def run_join(
    tables: Sequence[Table], partitions: int, normalise: str, duplicates: str, store: Store
) -> Iterable[Audit]:
    """Read, shuffle, join, write; every bucket's audit, in the order in which they finish."""
    carried = carried_fields(tables)
    source = PairSource(tables, partitions, normalise, exchange_schema(carried))
    context = DataContext.get_current()
    context.shuffle_input_batch_bytes = SHUFFLE_BATCH_BYTES
    context.execution_options.preserve_order = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    dataset = (
        ray.data.read_datasource(source, override_num_blocks=len(source.tasks), num_cpus=READ_CPUS)
        .groupby(BUCKET, num_partitions=partitions)
        .map_groups(
            write_bucket,
            batch_format="pyarrow",
            num_cpus=JOIN_CPUS,
            fn_kwargs={"carried": carried, "duplicates": duplicates, "store": store},
        )
    )
    for row in dataset.iter_rows():
        yield Audit.from_dict(json.loads(row["audit"]))


def carried_fields(tables: Sequence[Table]) -> list[pa.Field]:
    """The columns carried along, raw's first. The key is not among them unless it was asked for."""
    return [table.read.schema.field(name) for table in tables for name in table.carried]


class PairSource(Datasource):
    """Both tables as one stream of rows of the exchange: one ReadTask a span of neighbouring rows of a shard."""

    def __init__(self, tables: Sequence[Table], partitions: int, normalise: str, schema: pa.Schema) -> None:
        super().__init__()
        self.tasks = [
            _Read(
                table.side,
                number,
                shard,
                tuple(ranges),
                table.read,
                table.key,
                table.carried,
                normalise,
                partitions,
                schema,
            )
            for table in tables
            for number, shard in enumerate(table.shards)
            for ranges in read_spans(shard.row_groups if shard.rows else (), TASK_ROWS, BLOCK_ROWS)
        ]

    def get_name(self) -> str:
        return "Pairs"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(task, metadata) for task in self.tasks]


@dataclass(frozen=True)
class _Read:
    """What one ReadTask runs."""

    side: str
    number: int  # of the shard in its table
    shard: Shard
    ranges: tuple[tuple[int, int], ...]
    read: ReadSpec
    key: str
    carried: tuple[str, ...]
    normalise: str
    partitions: int
    schema: pa.Schema

    def __call__(self) -> Iterable[pa.Table]:
        for unit in iter_units(self.shard, self.ranges, self.read):
            unreadable = sum(damage.stop - damage.start for damage in unit.unreadable)
            yield to_exchange(
                self.side,
                self.number,
                unit.table,
                self.key,
                self.carried,
                unreadable,
                self.normalise,
                self.partitions,
                self.schema,
            )


def write_bucket(bucket: pa.Table, carried: Sequence[pa.Field], duplicates: str, store: Store) -> pa.Table:
    """Join one bucket and write its part, unless it holds no pair, or duplicates that are to be refused."""
    number = bucket[BUCKET][0].as_py()
    pairs, audit = join_bucket(bucket, carried)
    refused = duplicates == "refuse" and (audit.raw.duplicates or audit.synthetic.duplicates)
    if pairs.num_rows and not refused:
        sink = io.BytesIO()
        pq.write_table(pairs, sink, compression="zstd", row_group_size=ROW_GROUP_ROWS)
        store.put(f"part-{number:05d}.parquet", sink.getvalue())
    return pa.table({"audit": [json.dumps(asdict(audit))]})
