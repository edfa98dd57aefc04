"""A unit as one row of a Ray dataset, so that Ray can neither split nor merge it. Knows no Ray.

Ray Data cuts and joins blocks by size; a unit must reach its actor and its commit whole and alone. So between stages a
unit's table travels as one binary cell (Arrow IPC: opened without a copy), and the dataset's rows are units.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.errors import CapsFusionError

ENGINE_S = "engine_s"
BUSY_S = "busy_s"
DEVICE = "device"
_SCHEMA = pa.schema(
    [("unit", pa.string()), ("apart", pa.string()), ("spent", pa.string()), ("table", pa.large_binary())]
)


@dataclass(frozen=True)
class Apart:
    """The unit's rows that are not in its table: filtered ones by reason, and ranges that damage keeps from being read."""

    filtered: dict[str, int] = field(default_factory=dict)
    unreadable: tuple[tuple[int, int, str], ...] = ()  # start, stop, error
    settled: int = 0  # rows that stand in the dataset and are not retried

    @property
    def rows(self) -> int:
        return sum(self.filtered.values()) + sum(stop - start for start, stop, _ in self.unreadable) + self.settled


@dataclass(frozen=True)
class UnitBatch:
    """A unit, its rows, and what was spent on it (keyword arguments of parts.UnitSummary)."""

    unit: WorkUnit
    table: pa.Table
    apart: Apart = field(default_factory=Apart)
    spent: dict[str, Any] = field(default_factory=dict)

    def pack(self) -> pa.Table:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.table.schema) as writer:
            writer.write_table(self.table)
        texts = [json.dumps(value) for value in (asdict(self.unit), asdict(self.apart), self.spent)]
        cells = [*([text] for text in texts), [sink.getvalue().to_pybytes()]]
        return pa.table([pa.array(cell, f.type) for cell, f in zip(cells, _SCHEMA, strict=True)], schema=_SCHEMA)

    @classmethod
    def unpack(cls, batch: pa.Table) -> UnitBatch:
        if batch.num_rows != 1:
            raise ValueError(f"a unit batch has one row, this has {batch.num_rows}: batch_size must be 1")
        row = batch.combine_chunks()
        with pa.ipc.open_stream(row["table"].chunk(0)[0].as_buffer()) as reader:
            table = reader.read_all()
        unit, apart, spent = (json.loads(row[name][0].as_py()) for name in ("unit", "apart", "spent"))
        unreadable = tuple((start, stop, error) for start, stop, error in apart["unreadable"])
        return cls(WorkUnit(**unit), table, Apart(apart["filtered"], unreadable, apart["settled"]), spent)


@contextmanager
def named(unit: WorkUnit) -> Iterator[None]:
    """A bug's traceback says which unit it was at; what is raised on purpose says what it must by itself."""
    try:
        yield
    except CapsFusionError:
        raise
    except Exception as error:
        error.add_note(f"It was at unit {unit.id}: {unit.path}, rows {unit.start} to {unit.stop}.")
        raise
