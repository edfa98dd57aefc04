"""The part of a unit: its finished rows as one object, `_units/<unit id>.parquet`. A unit is committed when its part exists.

Knows the store and the columns; no Ray, no engine, no gates.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capsfusion_ray.core.accounting import UnitSummary, check_belongs
from capsfusion_ray.core.columns import OUTCOME
from capsfusion_ray.core.parquet import open_parquet, read_schema
from capsfusion_ray.core.types import Outcome, WorkUnit
from capsfusion_ray.dataset.layout import UNITS_DIR, part_path, retry_parts_dir
from capsfusion_ray.storage import Store, decode_note, encode_note

_SUMMARY_KEY = b"capsfusion_unit"
_READERS = 16  # a footer has a few kB: its time is the store's latency, not its bandwidth


def parts_of(store: Store, edition: int) -> Store:
    """A store for the parts of the edit that writes this edition; they are kept apart until they are merged."""
    return Store(f"{store.root}/{retry_parts_dir(edition)}", store.options)


def commit(store: Store, table: pa.Table, summary: UnitSummary) -> bool:
    """Write the part unless another attempt has. True: the part holds our rows; False: it holds the other attempt's."""
    # Whole in memory first: a stream closed after an error may publish a torn object.
    sink = io.BytesIO()
    footer = {_SUMMARY_KEY: encode_note(summary.to_dict())}
    pq.write_table(table.replace_schema_metadata(footer), sink, compression="zstd")
    return store.put_if_absent(part_path(summary.id), sink.getvalue())


def committed(store: Store) -> set[str]:
    """Ids of all units that have a part, from one paged listing."""
    names = (file.path.rsplit("/", 1)[-1] for file in store.list(UNITS_DIR))
    return {name.removesuffix(".parquet") for name in names if name.endswith(".parquet")}


def read_part(store: Store, unit: WorkUnit) -> tuple[pa.Table, UnitSummary]:
    """The rows of a part and its summary. Raises AccountingError where the part belongs to another unit."""
    data = store.get(part_path(unit.id))
    table = open_parquet(io.BytesIO(data), where=store.url(part_path(unit.id))).read()
    return table, _summary_of(unit, table.schema.metadata)


def split_part(part: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The rows for data/ and the rows for rejected/."""
    rejected = pc.equal(part[OUTCOME], str(Outcome.REJECTED))
    return part.filter(pc.invert(rejected)), part.filter(rejected)


def read_summaries(store: Store, units: Iterable[WorkUnit]) -> list[UnitSummary]:
    """The summaries of committed units, from the footers of their parts, in the order given."""

    def read(unit: WorkUnit) -> UnitSummary:
        with store.open_input(part_path(unit.id)) as source:
            return _summary_of(unit, read_schema(source, store.url(part_path(unit.id))).metadata)

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(read, units))


def remove_parts(store: Store, units: Iterable[WorkUnit]) -> None:
    """Remove the parts of units whose group is compacted; a part that does not exist is no error."""
    store.delete([part_path(unit.id) for unit in units])


def _summary_of(unit: WorkUnit, metadata: dict[bytes, bytes] | None) -> UnitSummary:
    summary = UnitSummary.parse(decode_note((metadata or {})[_SUMMARY_KEY]))
    check_belongs(summary, unit, part_path(unit.id))
    return summary
