"""What became of every planned row: planned = fused + kept + rejected + filtered + removed + unreadable.

The only place that knows which outcomes there are, what is counted for a unit, and how counts are added, subtracted and
checked. To count something more for each unit, add a `measure()` field to UnitSummary and Counts here, and put its value
into `UnitBatch.spent` where it is measured. Pure: knows no store and no gates.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from capsfusion_ray.core.columns import FLAGS, OUTCOME, OUTPUT_TOKENS, PROMPT_TOKENS, REASON
from capsfusion_ray.core.types import Outcome, WorkUnit
from capsfusion_ray.core.unit_batch import UnitBatch
from capsfusion_ray.errors import AccountingError

# Where a planned row can end, in the order in which people are shown them.
OUTCOMES = ("fused", "kept", "rejected", "filtered", "removed", "unreadable")
# Kind of file -> the outcomes whose rows it holds. Rows of the other outcomes are counted and not stored.
STORED = {"data": ("fused", "kept"), "rejected": ("rejected",)}


def measure(zero: float = 0) -> Any:
    """A field that says what was spent on rows: a number that is added up over units and over retries of a unit."""
    return field(default=zero, metadata={"measure": True})


def _measures(cls: Any) -> list[str]:
    return [each.name for each in dataclasses.fields(cls) if each.metadata.get("measure")]


@dataclass(frozen=True)
class UnitSummary:
    """What became of the rows [start, stop) of one shard. `path`: the shard."""

    id: str
    path: str
    start: int
    stop: int
    fused: int = 0
    kept: int = 0
    rejected: int = 0
    removed: int = 0
    unreadable: int = 0
    settled: int = 0  # of a retry's part alone: rows of the unit that the retry leaves as they are
    filtered: dict[str, int] = field(default_factory=dict)  # FilterReason -> rows, which are not stored
    reasons: dict[str, int] = field(default_factory=dict)  # Reason of the rejected rows -> rows
    flags: dict[str, int] = field(default_factory=dict)  # flag -> rows of data/ that carry it
    unreadable_errors: tuple[str, ...] = ()
    prompt_tokens: int = measure()
    output_tokens: int = measure()
    engine_s: float = measure(
        0.0
    )  # seconds from the unit's first prompt to its last caption; overlaps between units in flight
    busy_s: float = measure(0.0)  # its share of the seconds in which the engine worked; adds up over units in flight
    device: str = ""

    @property
    def planned(self) -> int:
        return self.stop - self.start

    def rows(self, outcome: str) -> int:
        """How many rows ended in one of OUTCOMES."""
        return sum(self.filtered.values()) if outcome == "filtered" else int(getattr(self, outcome))

    def check(self) -> None:
        """Raises AccountingError unless every planned row of the unit is accounted for exactly once."""
        total = self.settled + sum(self.rows(outcome) for outcome in OUTCOMES)
        where = f"unit {self.id} ({self.path}:{self.start}-{self.stop})"
        if total != self.planned:
            raise AccountingError(f"{where}: {self.planned} rows planned, {total} accounted for")
        if sum(self.reasons.values()) != self.rejected:
            raise AccountingError(f"{where}: {self.rejected} rows rejected, for {self.reasons}")

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> UnitSummary:
        """From a JSON object; what an earlier version did not count is 0."""
        return cls(**{**data, "unreadable_errors": tuple(data.get("unreadable_errors", ()))})

    def without(self, rows: pa.Table, removed: bool) -> UnitSummary:
        """Less `rows`, all of data/ or all of rejected/. They are `removed`, or the caller counts them anew.

        Raises AccountingError where there were fewer such rows.
        """
        if rows.num_rows == 0:
            return self
        reasons, flags = Counter(self.reasons), Counter(self.flags)
        change: dict[str, Any] = {"removed": self.removed + rows.num_rows} if removed else {}
        if REASON in rows.column_names:
            reasons.subtract(reason for reason in rows[REASON].to_pylist() if reason)
            change["rejected"] = self.rejected - rows.num_rows
        else:
            kept = sum(bool(row) and row[0] == str(Outcome.KEPT) for row in rows[FLAGS].to_pylist())
            flags.subtract(flags_of(rows))
            change |= {"kept": self.kept - kept, "fused": self.fused - (rows.num_rows - kept)}
        return dataclasses.replace(self, reasons=_positive(reasons), flags=_positive(flags), **change)

    def with_retried(self, more: UnitSummary) -> UnitSummary:
        """With what a retry of some of its rows came to."""
        names = ("fused", "kept", "rejected", *_measures(UnitSummary))
        sums = {name: getattr(self, name) + getattr(more, name) for name in names}
        reasons = Counter(self.reasons) + Counter(more.reasons)
        flags = Counter(self.flags) + Counter(more.flags)
        return dataclasses.replace(self, reasons=_positive(reasons), flags=_positive(flags), **sums)

    def with_flag(self, flag: str, rows: int) -> UnitSummary:
        """With `rows` rows of data/ that carry one flag more."""
        return dataclasses.replace(self, flags=_positive(Counter(self.flags) + Counter({flag: rows})))

    def with_rejects(self, reason: str, rows: int) -> UnitSummary:
        """With `rows` more rejected rows, which were counted as nothing else."""
        reasons = _positive(Counter(self.reasons) + Counter({reason: rows}))
        return dataclasses.replace(self, rejected=self.rejected + rows, reasons=reasons)


def summarise(batch: UnitBatch, part: pa.Table) -> UnitSummary:
    """Count a part's rows by outcome, reason and flag. Raises AccountingError unless each planned row is counted once."""
    unit = batch.unit
    rejected = pc.equal(part[OUTCOME], str(Outcome.REJECTED))
    outcomes = Counter(part[OUTCOME].to_pylist())
    unreadable = batch.apart.unreadable
    summary = UnitSummary(
        unit.id,
        unit.path,
        unit.start,
        unit.stop,
        fused=outcomes[str(Outcome.FUSED)],
        kept=outcomes[str(Outcome.KEPT)],
        rejected=outcomes[str(Outcome.REJECTED)],
        unreadable=sum(stop - start for start, stop, _ in unreadable),
        settled=batch.apart.settled,
        unreadable_errors=tuple(f"{unit.path}:{start}-{stop}: {error}" for start, stop, error in unreadable),
        filtered=dict(sorted(batch.apart.filtered.items())),
        reasons=dict(sorted(Counter(part.filter(rejected)[REASON].to_pylist()).items())),
        flags=dict(sorted(Counter(flags_of(part.filter(pc.invert(rejected)))).items())),
        prompt_tokens=pc.sum(part[PROMPT_TOKENS]).as_py() or 0,
        output_tokens=pc.sum(part[OUTPUT_TOKENS]).as_py() or 0,
        **batch.spent,
    )
    summary.check()
    return summary


def flags_of(rows: pa.Table) -> Iterable[str]:
    """Every flag of every row."""
    return (flag for row in rows[FLAGS].to_pylist() for flag in row or ())


@dataclass(frozen=True)
class RowCounts:
    """How many rows were planned, and how many of them ended in each of OUTCOMES."""

    planned: int = 0
    fused: int = 0
    kept: int = 0
    rejected: int = 0
    filtered: int = 0
    removed: int = 0
    unreadable: int = 0

    @property
    def rows(self) -> dict[str, int]:
        """These counts as a dict, in the order in which people read them."""
        return {name: getattr(self, name) for name in ("planned", *OUTCOMES)}

    @property
    def done(self) -> int:
        """Rows with an outcome. In a finished dataset they are all planned rows."""
        return sum(getattr(self, outcome) for outcome in OUTCOMES)


@dataclass(frozen=True)
class Counts(RowCounts):
    """The sums over all units of a dataset. `planned` comes from the plan, so that a missing unit shows."""

    reasons: dict[str, int] = field(default_factory=dict)
    filtered_by: dict[str, int] = field(default_factory=dict)
    flags: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = measure()
    output_tokens: int = measure()
    engine_s: float = measure(0.0)

    @classmethod
    def of(cls, units: Iterable[UnitSummary], planned: int) -> Counts:
        """Add up units."""
        sums: dict[str, Any] = {name: getattr(cls, name) for name in (*OUTCOMES, *_measures(cls))}  # their zeros
        reasons, filtered_by, flags = Counter[str](), Counter[str](), Counter[str]()
        for unit in units:
            for outcome in OUTCOMES:
                sums[outcome] += unit.rows(outcome)
            for name in _measures(cls):
                sums[name] += getattr(unit, name)
            reasons.update(unit.reasons)
            filtered_by.update(unit.filtered)
            flags.update(unit.flags)
        return cls(
            planned=planned,
            reasons=dict(sorted(reasons.items())),
            filtered_by=dict(sorted(filtered_by.items())),
            flags=dict(sorted(flags.items())),
            **{name: round(value, 3) for name, value in sums.items()},
        )


def check_stored(units: Sequence[UnitSummary], stored: Mapping[str, Iterable[tuple[str, int]]], what: str) -> None:
    """Raises AccountingError unless files hold exactly the rows that the units count. `stored`: kind -> (unit id, rows)."""
    for kind, outcomes in STORED.items():
        want = {unit.id: sum(unit.rows(outcome) for outcome in outcomes) for unit in units}
        have = dict.fromkeys(want, 0)
        for unit_id, rows in stored.get(kind, ()):
            have[unit_id] = have.get(unit_id, 0) + rows
        if want != have:
            wrong = sorted(unit_id for unit_id in have if want.get(unit_id) != have[unit_id])
            raise AccountingError(f"{what}: {kind} rows of units {wrong[:3]} do not add up")


def check_belongs(summary: UnitSummary, unit: WorkUnit, where: str) -> None:
    """Raises AccountingError where a summary is not that of `unit`, or does not add up."""
    if (summary.id, summary.path, summary.start, summary.stop) != (unit.id, unit.path, unit.start, unit.stop):
        raise AccountingError(f"{where}: holds {summary.path}:{summary.start}-{summary.stop}, planned {unit}")
    summary.check()


def _positive(counts: Counter[str]) -> dict[str, int]:
    if any(n < 0 for n in counts.values()):
        raise AccountingError(f"more rows than there were: {dict(counts)}")
    return {name: n for name, n in sorted(counts.items()) if n}
