"""The accounting of planned rows: planned = fused + kept + rejected + filtered + removed + unreadable.

Only this module knows which outcomes there are, what is counted per unit, and how counts are added, subtracted and checked.
To count something more per unit, add a `measure()` field to UnitSummary and to Counts here, and put its value into
`UnitBatch.spent` where it is measured. Pure: knows no store and no gates.
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

# What a planned row can become, in the order in which reports show it.
OUTCOMES = ("fused", "kept", "rejected", "filtered", "removed", "unreadable")
# Kind of data file -> the outcomes of the rows in it. Rows of the other outcomes are counted and not stored.
STORED = {"data": ("fused", "kept"), "rejected": ("rejected",)}


def measure(zero: float = 0) -> Any:
    """A field for an amount (seconds, tokens) that is added up over units and over the retries of a unit."""
    return field(default=zero, metadata={"measure": True})


def _measures(cls: Any) -> list[str]:
    return [each.name for each in dataclasses.fields(cls) if each.metadata.get("measure")]


@dataclass(frozen=True)
class UnitSummary:
    """What became of the rows [start, stop) of the shard `path`: one unit."""

    id: str
    path: str
    start: int
    stop: int
    fused: int = 0
    kept: int = 0
    rejected: int = 0
    removed: int = 0
    unreadable: int = 0
    not_retried: int = 0  # only in the part of a retry: rows of the unit that the retry leaves as they are
    filtered: dict[str, int] = field(default_factory=dict)  # FilterReason -> rows, which are not stored
    reasons: dict[str, int] = field(default_factory=dict)  # Reason -> rejected rows
    flags: dict[str, int] = field(default_factory=dict)  # flag -> rows of data/ that have it
    unreadable_errors: tuple[str, ...] = ()
    prompt_tokens: int = measure()
    output_tokens: int = measure()
    # Seconds from the unit's first prompt to its last caption. Units in one engine at the same time overlap.
    engine_s: float = measure(0.0)
    # The unit's share of the seconds in which its engine worked. These can be added up over units.
    busy_s: float = measure(0.0)
    device: str = ""

    @property
    def planned(self) -> int:
        return self.stop - self.start

    def rows(self, outcome: str) -> int:
        """How many rows have this outcome, one of OUTCOMES."""
        return sum(self.filtered.values()) if outcome == "filtered" else int(getattr(self, outcome))

    def check(self) -> None:
        """Raises AccountingError unless every planned row of the unit is counted exactly once."""
        where = f"unit {self.id} ({self.path}:{self.start}-{self.stop})"
        counts = {"not_retried": self.not_retried, **{outcome: self.rows(outcome) for outcome in OUTCOMES}}
        if negative := {name: rows for name, rows in counts.items() if rows < 0}:
            raise AccountingError(f"{where}: negative counts of rows: {negative}")
        if sum(counts.values()) != self.planned:
            raise AccountingError(f"{where}: {self.planned} rows planned, {sum(counts.values())} counted: {counts}")
        if sum(self.reasons.values()) != self.rejected:
            raise AccountingError(f"{where}: {self.rejected} rows rejected, for these reasons: {self.reasons}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as in a part's footer, a group's entry and the manifest; `not_retried` has its name of version 0.1."""
        return {_STORED_NAMES.get(name, name): value for name, value in vars(self).items()}

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> UnitSummary:
        """The inverse of to_dict. A count that the writer did not know is 0."""
        fields = {_NAMES.get(name, name): value for name, value in data.items()}
        return cls(**{**fields, "unreadable_errors": tuple(fields.get("unreadable_errors", ()))})

    def without(self, rows: pa.Table, removed: bool) -> UnitSummary:
        """The summary without `rows`, all of them of data/ or all of them of rejected/.

        `removed`: count them as removed. Otherwise the caller counts them again. Raises AccountingError where the unit
        has fewer such rows.
        """
        if rows.num_rows == 0:
            return self
        outcomes, reasons, flags = Counter[str](), Counter(self.reasons), Counter(self.flags)
        if REASON in rows.column_names:
            outcomes["rejected"] = rows.num_rows
            reasons.subtract(reason for reason in rows[REASON].to_pylist() if reason)
        else:
            outcomes["kept"] = sum(bool(row) and row[0] == str(Outcome.KEPT) for row in rows[FLAGS].to_pylist())
            outcomes["fused"] = rows.num_rows - outcomes["kept"]
            flags.subtract(flags_of(rows))
        left = Counter({name: self.rows(name) for name in outcomes})
        left.subtract(outcomes)
        _refuse_negative(left)
        change = dict(left) | ({"removed": self.removed + rows.num_rows} if removed else {})
        return dataclasses.replace(self, reasons=_positive(reasons), flags=_positive(flags), **change)

    def with_retried(self, more: UnitSummary) -> UnitSummary:
        """The summary with the rows of a retry's part added; the rows that were retried are subtracted before (`without`)."""
        names = (*(outcome for outcomes in STORED.values() for outcome in outcomes), *_measures(UnitSummary))
        sums = {name: getattr(self, name) + getattr(more, name) for name in names}
        reasons = Counter(self.reasons) + Counter(more.reasons)
        flags = Counter(self.flags) + Counter(more.flags)
        return dataclasses.replace(self, reasons=_positive(reasons), flags=_positive(flags), **sums)

    def with_flag(self, flag: str, rows: int) -> UnitSummary:
        """The summary after `rows` rows of data/ got this flag."""
        return dataclasses.replace(self, flags=_positive(Counter(self.flags) + Counter({flag: rows})))

    def with_rejects(self, reason: str, rows: int) -> UnitSummary:
        """The summary with `rows` more rejected rows, which are not counted in it yet."""
        reasons = _positive(Counter(self.reasons) + Counter({reason: rows}))
        return dataclasses.replace(self, rejected=self.rejected + rows, reasons=reasons)


_STORED_NAMES = {"not_retried": "settled"}  # field -> its name in files, which version 0.1 chose
_NAMES = {stored: name for name, stored in _STORED_NAMES.items()}


def summarise(batch: UnitBatch, part: pa.Table) -> UnitSummary:
    """Count the rows of a part by outcome, reason and flag, and add the batch's rows that are in no table.

    Raises AccountingError unless every planned row of the unit is counted exactly once.
    """
    unit = batch.unit
    rejected = pc.equal(part[OUTCOME], str(Outcome.REJECTED))
    unreadable = batch.apart.unreadable
    outcomes = Counter(part[OUTCOME].to_pylist())
    summary = UnitSummary(
        unit.id,
        unit.path,
        unit.start,
        unit.stop,
        fused=outcomes[str(Outcome.FUSED)],
        kept=outcomes[str(Outcome.KEPT)],
        rejected=outcomes[str(Outcome.REJECTED)],
        unreadable=sum(stop - start for start, stop, _ in unreadable),
        not_retried=batch.apart.not_retried,
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
        """`planned` and every outcome -> rows, in the order of OUTCOMES."""
        return {name: getattr(self, name) for name in ("planned", *OUTCOMES)}

    @property
    def done(self) -> int:
        """Rows with an outcome. In a finished dataset they are all planned rows."""
        return sum(getattr(self, outcome) for outcome in OUTCOMES)


@dataclass(frozen=True)
class Counts(RowCounts):
    """The sums over all units of a dataset. `planned` is counted from the plans, so that a missing unit shows."""

    reasons: dict[str, int] = field(default_factory=dict)
    filtered_by: dict[str, int] = field(default_factory=dict)
    flags: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = measure()
    output_tokens: int = measure()
    engine_s: float = measure(0.0)

    @classmethod
    def of(cls, units: Iterable[UnitSummary], planned: int) -> Counts:
        """Add up the summaries of `units`. `planned`: rows of the plans."""
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

    @property
    def causes(self) -> dict[str, dict[str, int]]:
        """Outcome -> cause -> rows, of the outcomes that have causes."""
        return {"rejected": self.reasons, "filtered": self.filtered_by}


def check_stored(units: Sequence[UnitSummary], stored: Mapping[str, Iterable[tuple[str, int]]], what: str) -> None:
    """Raises AccountingError unless the data files hold exactly the rows that `units` count.

    `stored`: kind of file -> (unit id, its rows) of each file. `what`: for the message.
    """
    for kind, outcomes in STORED.items():
        want = {unit.id: sum(unit.rows(outcome) for outcome in outcomes) for unit in units}
        have = dict.fromkeys(want, 0)
        for unit_id, rows in stored.get(kind, ()):
            have[unit_id] = have.get(unit_id, 0) + rows
        if want != have:
            wrong = sorted(unit_id for unit_id in have if want.get(unit_id) != have[unit_id])
            shown = ", ".join(
                f"{unit_id}: {have[unit_id]} in files, {want.get(unit_id, 0)} counted" for unit_id in wrong[:3]
            )
            raise AccountingError(
                f"{what}: {kind}/ does not hold the rows that are counted of {len(wrong)} units ({shown})"
            )


def check_belongs(summary: UnitSummary, unit: WorkUnit, where: str) -> None:
    """Raises AccountingError where the summary is of another unit, or does not count each row once. `where`: its file."""
    if (summary.id, summary.path, summary.start, summary.stop) != (unit.id, unit.path, unit.start, unit.stop):
        raise AccountingError(
            f"{where}: holds rows of {summary.path}:{summary.start}-{summary.stop} (unit {summary.id}), and {unit} is planned"
        )
    summary.check()


def _positive(counts: Counter[str]) -> dict[str, int]:
    """Sorted by name, without zeros. Raises AccountingError for a negative count."""
    _refuse_negative(counts)
    return {name: n for name, n in sorted(counts.items()) if n}


def _refuse_negative(counts: Counter[str]) -> None:
    if negative := {name: n for name, n in counts.items() if n < 0}:
        raise AccountingError(f"more rows are subtracted than were counted: {negative}")
