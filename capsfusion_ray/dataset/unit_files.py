"""A unit's finished rows -> one object, `_units/<unit id>.parquet`; that it exists is the commit.

Knows the store and the columns; no Ray, no engine, no gates.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq

from capsfusion_ray.core.accounting import UnitSummary, check_belongs
from capsfusion_ray.core.parquet import open_parquet, read_schema
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.dataset.layout import UNITS_DIR, part_path, retry_parts_dir
from capsfusion_ray.storage import Store

_SUMMARY_KEY = b"capsfusion_unit"
_READERS = 16  # footers are a few kB each: latency, not bandwidth


def parts_of(store: Store, edition: int) -> Store:
    """Where the parts of one revision of the dataset lie, apart, until they are merged."""
    return Store(f"{store.root}/{retry_parts_dir(edition)}", store.options)


def commit(store: Store, table: pa.Table, summary: UnitSummary) -> bool:
    """Put the part if no attempt did before. True: ours is the commit; False: another attempt won, and its rows stand."""
    # Whole in memory first: a stream closed after an error may publish a torn object.
    sink = io.BytesIO()
    footer = {_SUMMARY_KEY: json.dumps(asdict(summary)).encode()}
    pq.write_table(table.replace_schema_metadata(footer), sink, compression="zstd")
    return store.put_if_absent(part_path(summary.id), sink.getvalue())


def committed(store: Store) -> set[str]:
    """Ids of all units that have a part, from one paged listing."""
    names = (file.path.rsplit("/", 1)[-1] for file in store.list(UNITS_DIR))
    return {name.removesuffix(".parquet") for name in names if name.endswith(".parquet")}


def read_part(store: Store, unit: WorkUnit) -> tuple[pa.Table, UnitSummary]:
    """Raises AccountingError where the part is not this unit's."""
    data = store.get(part_path(unit.id))
    table = open_parquet(io.BytesIO(data), where=store.url(part_path(unit.id))).read()
    return table, _summary_of(unit, table.schema.metadata)


def read_summaries(store: Store, units: Iterable[WorkUnit]) -> list[UnitSummary]:
    """The summaries of committed units, from the parts' footers, in order."""

    def read(unit: WorkUnit) -> UnitSummary:
        with store.open_input(part_path(unit.id)) as source:
            return _summary_of(unit, read_schema(source, store.url(part_path(unit.id))).metadata)

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(read, units))


def _summary_of(unit: WorkUnit, metadata: dict[bytes, bytes] | None) -> UnitSummary:
    summary = UnitSummary.parse(json.loads((metadata or {})[_SUMMARY_KEY]))
    check_belongs(summary, unit, part_path(unit.id))
    return summary
