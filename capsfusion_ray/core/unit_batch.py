"""A unit packed into one row of a Ray dataset, so that Ray can neither split nor merge it. Knows no Ray.

Ray Data splits and merges blocks by size, but a unit must reach its actor and its commit whole and alone. So between stages a
unit's table is one binary cell (Arrow IPC, which is opened without a copy), and each row of the Ray dataset is a unit.
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
    """The unit's rows that are not in its table: filtered ones, unreadable row ranges, and rows that are not retried."""

    filtered: dict[str, int] = field(default_factory=dict)  # FilterReason -> rows
    unreadable: tuple[tuple[int, int, str], ...] = ()  # start, stop, error
    not_retried: int = 0  # in a retry: rows that stay in the dataset as they are

    @property
    def rows(self) -> int:
        """How many rows these are."""
        return sum(self.filtered.values()) + sum(stop - start for start, stop, _ in self.unreadable) + self.not_retried


@dataclass(frozen=True)
class UnitBatch:
    """A unit, its rows, and what was spent on it (keyword arguments of accounting.UnitSummary)."""

    unit: WorkUnit
    table: pa.Table
    apart: Apart = field(default_factory=Apart)
    spent: dict[str, Any] = field(default_factory=dict)

    def pack(self) -> pa.Table:
        """One row: the unit, what is apart and what was spent as JSON, and the table as Arrow IPC."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.table.schema) as writer:
            writer.write_table(self.table)
        texts = [json.dumps(value) for value in (asdict(self.unit), asdict(self.apart), self.spent)]
        cells = [*([text] for text in texts), [sink.getvalue().to_pybytes()]]
        return pa.table([pa.array(cell, f.type) for cell, f in zip(cells, _SCHEMA, strict=True)], schema=_SCHEMA)

    @classmethod
    def unpack(cls, batch: pa.Table) -> UnitBatch:
        """The inverse of pack. Raises ValueError for a batch of more or fewer rows than one."""
        if batch.num_rows != 1:
            raise ValueError(
                f"a packed unit is a batch of one row, and this batch has {batch.num_rows}; batch_size must be 1"
            )
        row = batch.combine_chunks()
        with pa.ipc.open_stream(row["table"].chunk(0)[0].as_buffer()) as reader:
            table = reader.read_all()
        unit, apart, spent = (json.loads(row[name][0].as_py()) for name in ("unit", "apart", "spent"))
        unreadable = tuple((start, stop, error) for start, stop, error in apart["unreadable"])
        return cls(WorkUnit(**unit), table, Apart(apart["filtered"], unreadable, apart["not_retried"]), spent)


@contextmanager
def unit_in_traceback(unit: WorkUnit) -> Iterator[None]:
    """Add the unit to the traceback of an unexpected exception; a CapsFusionError has a complete message already."""
    try:
        yield
    except CapsFusionError:
        raise
    except Exception as error:
        error.add_note(f"This happened in unit {unit.id}: {unit.path}, rows {unit.start} to {unit.stop}.")
        raise
