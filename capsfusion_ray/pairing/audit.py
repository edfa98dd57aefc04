"""Counts of what happened to every row of the two tables, and the check that none is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from capsfusion_ray.errors import AccountingError
from capsfusion_ray.pairing.shuffle_rows import RAW_SIDE, SYNTHETIC_SIDE

EXAMPLES = 3  # keys to show of each kind


@dataclass(frozen=True)
class SideAudit:
    """The rows of one table by what happened to them. `conflicting` counts rows of `duplicates`; the other counts add up to `total`."""

    matched: int = 0
    unmatched: int = 0  # the other table has no such key
    duplicates: int = 0  # an earlier row has the same key
    conflicting: int = 0  # duplicates whose caption differs from that of the first row
    without_key: int = 0  # the key is null or empty
    unusable: int = 0  # the caption is not UTF-8, or the line cannot be parsed
    unreadable: int = 0  # the row is in a damaged part of the file
    unmatched_keys: tuple[str, ...] = ()  # examples
    duplicate_keys: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return self.matched + self.unmatched + self.duplicates + self.without_key + self.unusable + self.unreadable

    def __add__(self, other: SideAudit) -> SideAudit:
        mine, others = asdict(self), asdict(other)
        summed: dict[str, Any] = {name: mine[name] + others[name] for name in mine}
        for name in ("unmatched_keys", "duplicate_keys"):
            summed[name] = tuple(sorted(summed[name])[:EXAMPLES])  # the same examples in any order of the buckets
        return SideAudit(**summed)


@dataclass(frozen=True)
class Audit:
    """The counts of one bucket, or of all buckets added up."""

    raw: SideAudit = field(default_factory=SideAudit)
    synthetic: SideAudit = field(default_factory=SideAudit)
    buckets: int = 0  # with at least one row
    largest_bucket: int = 0  # rows of the largest one

    def __add__(self, other: Audit) -> Audit:
        largest = max(self.largest_bucket, other.largest_bucket)
        return Audit(self.raw + other.raw, self.synthetic + other.synthetic, self.buckets + other.buckets, largest)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Audit:
        """The audit from its `asdict`, also after JSON. Unknown keys of a side are ignored."""

        def side(name: str) -> SideAudit:
            known: dict[str, Any] = {f.name: values[name][f.name] for f in fields(SideAudit)}
            for examples in ("unmatched_keys", "duplicate_keys"):
                known[examples] = tuple(known[examples])  # JSON has lists
            return SideAudit(**known)

        return cls(side(RAW_SIDE), side(SYNTHETIC_SIDE), values["buckets"], values["largest_bucket"])

    def check(self, planned: Mapping[str, int]) -> None:
        """Raises AccountingError unless every planned row of both tables is counted, and each pair has one row of each."""
        for side, audit in ((RAW_SIDE, self.raw), (SYNTHETIC_SIDE, self.synthetic)):
            if audit.total != planned[side]:
                raise AccountingError(
                    f"{side}: {planned[side]} rows planned, {audit.total} accounted for: {asdict(audit)}"
                )
        if self.raw.matched != self.synthetic.matched:
            raise AccountingError(f"{self.raw.matched} raw rows matched {self.synthetic.matched} synthetic rows")
