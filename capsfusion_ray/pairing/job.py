"""The pair job: join a table of raw captions with a table of synthetic ones into one that the fuse job reads.

    <output>/part-00017.parquet     the pairs of one bucket: image_url, laion_2b, laion_coco, the passthrough columns
    <output>/_pair/settings.json    everything that decides the data files; a pairing with other settings is refused
    <output>/_pair/exchange/        the shuffle files, as large as the columns of both tables together; deleted at the end
    <output>/_pair/buckets/         the audit of each bucket that is joined; deleted at the end
    <output>/_pair/audit.json       what happened to every row of both tables; written last, so that it is the commit

The name and the bytes of a data file follow from the input and the settings alone. The same command continues a killed run.
Memory: a task holds 500,000 rows three times, whatever the size of the tables. Only a key that millions of rows share makes a
larger bucket.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from capsfusion_ray.config import ClusterConfig, InputConfig, fingerprint
from capsfusion_ray.dataset.layout import LEASE
from capsfusion_ray.dataset.lease import Lease
from capsfusion_ray.errors import ConfigError, SourceError
from capsfusion_ray.pairing.audit import Audit, SideAudit
from capsfusion_ray.pairing.config import PairConfig
from capsfusion_ray.pairing.ray_join import Join, run_join, sweep
from capsfusion_ray.pairing.shuffle_files import Table
from capsfusion_ray.pairing.shuffle_rows import RAW_SIDE, SIDES, SYNTHETIC_SIDE
from capsfusion_ray.pairing.survey import survey
from capsfusion_ray.run import cluster
from capsfusion_ray.sources import refuse_output_in_input
from capsfusion_ray.storage import Store

log = logging.getLogger(__name__)
SETTINGS, AUDIT = "_pair/settings.json", "_pair/audit.json"
BUCKET_ROWS = 500_000  # of both tables, on average: about 120 MB of captions, URLs and keys


def pair(cfg: PairConfig) -> dict[str, Any]:
    """Survey both tables, join them, write the data files and last the audit.

    Returns the audit: pairs, then per table rows, matched_share, columns, shards and counts, then partitions, buckets,
    largest_bucket, seconds and output. Raises SourceError for tables that cannot be paired, ConfigError for an output that
    holds something else, AccountingError if a row is lost.
    """
    began = time.monotonic()
    for side, table in ((RAW_SIDE, cfg.raw), (SYNTHETIC_SIDE, cfg.synthetic)):
        refuse_output_in_input(InputConfig(table.path).paths, f"{side}.path", cfg.output.path)
    tables = [survey(RAW_SIDE, cfg.raw, cfg.normalise), survey(SYNTHETIC_SIDE, cfg.synthetic, cfg.normalise)]
    partitions = cfg.partitions or min(-(-sum(table.rows for table in tables) // BUCKET_ROWS), 10_000)
    store = Store(cfg.output.path, cfg.output.storage)
    with Lease(store, cfg.takeover) as lease:
        _claim(store, settings(cfg, tables, partitions))
        if store.exists(AUDIT):
            return _finished(cfg, store)
        audit = _joined(
            cfg, Join({table.side: table for table in tables}, partitions, cfg.normalise, cfg.duplicates, store)
        )
        lease.check()
        audit.check({table.side: table.rows for table in tables})
        refuse_duplicates(cfg, audit)
        _refuse_no_pair(store, tables, audit)
        report = _report(tables, audit) | {"partitions": partitions, "buckets": audit.buckets}
        report |= {"largest_bucket": audit.largest_bucket, "seconds": round(time.monotonic() - began, 2)}
        report["output"] = cfg.output.path
        store.put(AUDIT, json.dumps(report, indent=1, ensure_ascii=False).encode())
        sweep(store)
        return report


def _finished(cfg: PairConfig, store: Store) -> dict[str, Any]:
    """The audit of a pairing that is finished; what a killed driver left is deleted."""
    done: dict[str, Any] = json.loads(store.get(AUDIT))
    refuse_duplicates(cfg, Audit.from_dict(done))
    sweep(store)
    log.info("nothing is left to do: %s holds this pairing", cfg.output.path)
    return done


def _joined(cfg: PairConfig, join: Join) -> Audit:
    cluster.connect(ClusterConfig(address=cfg.address))
    try:
        return run_join(join)
    finally:
        cluster.disconnect()


def _refuse_no_pair(store: Store, tables: Sequence[Table], audit: Audit) -> None:
    """Raises SourceError if no key is in both tables, and frees the output, so that it may be used with another key."""
    if audit.raw.matched == 0:
        sweep(store)
        store.delete([SETTINGS])
        raise SourceError(
            f"no key of raw ({tables[0].columns['key']}, e.g. {list(audit.raw.unmatched_keys)}) is one of synthetic "
            f"({tables[1].columns['key']}, e.g. {list(audit.synthetic.unmatched_keys)}); set raw.key and synthetic.key, or normalise=url"
        )


def _report(tables: Sequence[Table], audit: Audit) -> dict[str, Any]:
    """The number of pairs and the counts of each table."""
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
    return report


def settings(cfg: PairConfig, tables: Sequence[Table], partitions: int) -> dict[str, Any]:
    """Everything that decides the data files. `duplicates` does not: a file is the same under both policies, or is not written."""
    decides: dict[str, Any] = {"normalise": cfg.normalise, "partitions": partitions}
    for table in tables:
        decides |= {f"{table.side}.{role}": name for role, name in table.columns.items()}
        # The schema does not say whether the key is a passthrough column, too.
        decides[f"{table.side}.passthrough"] = list(table.carried)
        decides[f"{table.side}.schema"] = str(table.read.schema)
        decides[f"{table.side}.path"] = fingerprint(
            {shard.path: [shard.content_key, shard.rows, i] for i, shard in enumerate(table.shards)}
        )
    return decides


def _claim(store: Store, wanted: dict[str, Any]) -> None:
    """Write the settings into an empty output. Raises ConfigError if it holds other files, or a pairing with other settings."""
    if not store.exists(SETTINGS):
        found = [file for file in store.list() if file.path != LEASE]
        if found:
            raise ConfigError(
                f"output.path={store.root}: it is not empty and holds no pairing (it has {found[0].path}); choose another"
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
    """Raises SourceError for rows with the key of an earlier row, if duplicates=refuse."""
    if cfg.duplicates == "refuse" and (audit.raw.duplicates or audit.synthetic.duplicates):
        found = "; ".join(
            f"{side}: {counts.duplicates} rows ({counts.conflicting} with another caption), e.g. {list(counts.duplicate_keys)}"
            for side in SIDES
            if (counts := getattr(audit, side)).duplicates
        )
        raise SourceError(
            f"duplicates=refuse: rows whose key an earlier row has: {found}; give duplicates=first, or clean the table"
        )
