"""A unit's finished rows -> one object, `_units/<unit id>.parquet`; that it exists is the commit.

Knows the store and the columns; no Ray, no engine, no gates.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capsfusion_ray.core.columns import (
    DATA_FIELDS,
    FLAGS,
    OUTCOME,
    OUTPUT_TOKENS,
    PART_FIELDS,
    PROMPT_TOKENS,
    REASON,
    extra_fields,
)
from capsfusion_ray.core.parquet import open_parquet, read_schema
from capsfusion_ray.core.types import Outcome, WorkUnit
from capsfusion_ray.core.unit_batch import UnitBatch
from capsfusion_ray.errors import AccountingError
from capsfusion_ray.storage import Store

PARTS_DIR = "_retry"  # of a retry or a repair
UNITS_DIR = "_units"
_SUMMARY_KEY = b"capsfusion_unit"
_READERS = 16  # footers are a few kB each: latency, not bandwidth


@dataclass(frozen=True)
class UnitSummary:
    """What became of a unit's rows; the accounting of the whole run is the sum of these."""

    id: str
    path: str
    start: int
    stop: int
    fused: int = 0
    kept: int = 0
    rejected: int = 0
    removed: int = 0
    unreadable: int = 0
    settled: int = 0  # of a retry's part alone: rows of the unit that were not retried
    filtered: dict[str, int] = field(default_factory=dict)  # FilterReason -> rows, not stored
    reasons: dict[str, int] = field(
        default_factory=dict
    )  # Reason of the rejected rows -> rows; that of a kept one is a flag
    flags: dict[str, int] = field(default_factory=dict)  # Reason -> rows of data/ that carry the flag
    unreadable_errors: tuple[str, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    engine_s: float = 0.0  # wall time from the unit's first prompt to its last caption
    busy_s: float = (
        0.0  # its share of the time that the engine was at work: these add up over units in flight, engine_s overlaps
    )
    device: str = ""

    def check(self) -> None:
        """Raises AccountingError unless every planned row of the unit is accounted for exactly once."""
        total = (
            self.fused
            + self.kept
            + self.rejected
            + self.removed
            + self.unreadable
            + self.settled
            + sum(self.filtered.values())
        )
        if total != self.stop - self.start:
            raise AccountingError(
                f"unit {self.id} ({self.path}:{self.start}-{self.stop}): {self.stop - self.start} rows planned, {total} accounted for"
            )
        if sum(self.reasons.values()) != self.rejected:
            raise AccountingError(
                f"unit {self.id} ({self.path}:{self.start}-{self.stop}): {self.rejected} rows rejected, for {self.reasons}"
            )

    @classmethod
    def parse(cls, data: dict[str, Any]) -> UnitSummary:
        return cls(**{**data, "unreadable_errors": tuple(data.get("unreadable_errors", ()))})


def part_schema(fields: Sequence[tuple[str, str]]) -> pa.Schema:
    """The frozen schema of a part: the dataset's columns, the reject's, and the tokens spent."""
    return pa.schema([*DATA_FIELDS, *extra_fields(fields), *PART_FIELDS])


def summarise(batch: UnitBatch, part: pa.Table) -> UnitSummary:
    """Count a part's rows by outcome, reason and flag, and check that no planned row is missing."""
    unit = batch.unit
    outcomes = Counter(part[OUTCOME].to_pylist())
    reasons = Counter(part.filter(pc.equal(part[OUTCOME], str(Outcome.REJECTED)))[REASON].to_pylist())
    stored = part.filter(pc.not_equal(part[OUTCOME], str(Outcome.REJECTED)))
    flags = Counter(flag for row in stored[FLAGS].to_pylist() for flag in row or ())
    unreadable = batch.apart.unreadable
    summary = UnitSummary(
        unit.id,
        unit.path,
        unit.start,
        unit.stop,
        fused=outcomes.pop(str(Outcome.FUSED), 0),
        kept=outcomes.pop(str(Outcome.KEPT), 0),
        rejected=outcomes.pop(str(Outcome.REJECTED), 0),
        unreadable=sum(stop - start for start, stop, _ in unreadable),
        settled=batch.apart.settled,
        unreadable_errors=tuple(f"{unit.path}:{start}-{stop}: {error}" for start, stop, error in unreadable),
        filtered=dict(sorted(batch.apart.filtered.items())),
        reasons=dict(sorted(reasons.items())),
        flags=dict(sorted(flags.items())),
        prompt_tokens=pc.sum(part[PROMPT_TOKENS]).as_py() or 0,
        output_tokens=pc.sum(part[OUTPUT_TOKENS]).as_py() or 0,
        **batch.spent,
    )
    summary.check()
    return summary


def parts_of(store: Store, edition: int) -> Store:
    """Where the parts of one revision of the dataset lie, apart, until they are merged."""
    return Store(f"{store.root}/{PARTS_DIR}/e{edition:03d}", store.options)


def part_path(unit_id: str) -> str:
    return f"{UNITS_DIR}/{unit_id}.parquet"


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
    if (summary.id, summary.path, summary.start, summary.stop) != (unit.id, unit.path, unit.start, unit.stop):
        raise AccountingError(
            f"{part_path(unit.id)}: holds {summary.path}:{summary.start}-{summary.stop}, planned {unit}"
        )
    summary.check()
    return summary
