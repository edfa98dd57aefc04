"""Cut input shards into WorkUnits: the Plan, its file, and what may not change once it is written. Pure: knows no Ray, no network, no clock."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from capsfusion_ray.config import fingerprint
from capsfusion_ray.core.parquet import open_parquet
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.errors import AccountingError, PlanChanged, SourceError

PLAN_VERSION = 1
MOST_LOST = 0.9  # of an actor's life, in an estimate

# Captions/s of one actor, to cut the first units and to quote hours before anything ran; `unit.captions_per_s` and the
# figures of a finished pilot are better. GPU: LLaMA-2-13B, 3 beams (computed: docs/laion-coco.md); CPU: the embedded
# model on one core.
GUESSED_CAPTIONS_PER_S = {
    ("beam", "cuda"): 90.0,
    ("beam", "cpu"): 10.0,
    ("transformers", "cuda"): 1.5,
    ("transformers", "cpu"): 1.5,
    ("vllm", "cuda"): 150.0,  # no beams: computed, never measured; calibrate=true measures
    ("vllm", "cpu"): 1.5,
    ("api", "cuda"): 10.0,  # 32 requests in flight of 3 s each
    ("api", "cpu"): 10.0,
    ("echo", "cuda"): 20_000.0,
    ("echo", "cpu"): 20_000.0,
}
# Captions that an actor writes at a time where engine.slots is not given, to quote what its death destroys.
GUESSED_SLOTS = {("beam", "cuda"): 400, ("beam", "cpu"): 96, ("vllm", "cuda"): 256, ("vllm", "cpu"): 256}
# A unit's last caption ends so many captions' times after the next unit began: captions of 80 tokens where the mean has 41, less
# half a caption's time by which a unit's words lag behind its prompts.
DRAIN = 1.5


class Shard(Protocol):
    """What the plan must know of an input file. `sources.Shard` has it; the plan does not know how a file is opened."""

    @property
    def path(self) -> str: ...
    @property
    def content_key(self) -> str: ...
    @property
    def rows(self) -> int | None: ...
    @property
    def row_groups(self) -> tuple[int, ...]: ...
    @property
    def error(self) -> str: ...


@dataclass(frozen=True)
class PlannedShard:
    """What a plan stores about a shard, so that a later run can tell a changed shard from a new one."""

    path: str
    content_key: str
    rows: int
    group: str
    error: str = ""


@dataclass(frozen=True)
class Plan:
    """Units to fuse, the shards they were cut from, and the settings that decide the output.

    A fresh output has plan 1. Each extension by new shards or a larger `input.limit` adds a plan with the next number.
    """

    number: int  # from 1
    base: dict[str, Any]  # config key or input -> value: all that decides the output; `fingerprint` is its hash
    unit_rows: int
    fields: tuple[tuple[str, str], ...]  # reference and passthrough columns: (name, Arrow type), fixed by plan 1
    units: tuple[WorkUnit, ...]
    shards: tuple[PlannedShard, ...]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.base)

    @property
    def rows(self) -> int:
        return sum(unit.rows for unit in self.units)

    def to_bytes(self) -> bytes:
        """One Parquet object: one row per unit; everything else is in the metadata of the schema."""
        header = {
            "version": PLAN_VERSION,
            "revision": self.number,  # the key that plan files have had since version 1
            "base": self.base,
            "unit_rows": self.unit_rows,
            "fields": self.fields,
            "shards": [asdict(shard) for shard in self.shards],
        }
        names = ("id", "path", "start", "stop", "group")
        types = (pa.string(), pa.string(), pa.int64(), pa.int64(), pa.string())
        schema = pa.schema(list(zip(names, types, strict=True)), metadata={"capsfusion_plan": json.dumps(header)})
        columns = [
            pa.array([getattr(unit, name) for unit in self.units], type_)
            for name, type_ in zip(names, types, strict=True)
        ]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), sink, compression="zstd")
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        """The plan that `to_bytes` wrote. Raises AccountingError for another version of the format."""
        table = open_parquet(io.BytesIO(data)).read()
        header = json.loads((table.schema.metadata or {})[b"capsfusion_plan"])
        if header["version"] != PLAN_VERSION:
            raise AccountingError(
                f"plan version {header['version']}: this release reads version {PLAN_VERSION}; finish the run with the "
                "release that began it, or choose a new output.path"
            )
        units = tuple(WorkUnit(**row) for row in table.to_pylist())
        shards = tuple(PlannedShard(**shard) for shard in header["shards"])
        fields = tuple((name, type_) for name, type_ in header["fields"])
        return cls(header["revision"], header["base"], header["unit_rows"], fields, units, shards)


# ------------------------------------------------------------------------------------------------------------- cutting


def unit_id(path: str, content_key: str, start: int, stop: int) -> str:
    """The same rows of the same content get the same id in every run."""
    return hashlib.sha256(f"{path}\0{content_key}\0{start}\0{stop}".encode()).hexdigest()[:20]


def wanted_ranges(shards: Sequence[Shard], limit: int | None) -> dict[str, int]:
    """Path -> number of rows to take from the start of that shard: all, or `limit` rows spread evenly over the readable shards.

    A larger limit takes at least the rows of a smaller one from every shard, so that a full run reuses the captions of a pilot.
    """
    readable = [shard for shard in shards if not shard.error and shard.rows]
    rows = {shard.path: shard.rows or 0 for shard in readable}
    if limit is None:
        return rows
    # Water-filling: go from the smallest shard to the largest, and take from each an even share of what is left.
    left = limit
    taken: dict[str, int] = {}
    by_rows = sorted(rows, key=lambda path: (rows[path], path))
    for position, path in enumerate(by_rows):
        taken[path] = min(rows[path], left // (len(by_rows) - position))
        left -= taken[path]
    return taken


def cut_range(start: int, stop: int, row_groups: Sequence[int], unit_rows: int) -> Iterator[tuple[int, int]]:
    """Cut the row range [start, stop) of a shard into unit ranges of at most `unit_rows`, at row-group borders where possible.

    Small row groups are gathered up to unit_rows. A large one is cut evenly, and its units share one read task.
    """
    at, group_start, pending = start, 0, start
    for group_rows in row_groups or (stop,):
        low, high = max(group_start, start), min(group_start + group_rows, stop)
        group_start += group_rows
        if high <= low:
            continue
        if high - pending <= unit_rows:
            at = high
            continue
        if at > pending:
            yield pending, at
            pending = at
        if high - pending > unit_rows:
            pieces = -(-(high - pending) // unit_rows)
            cuts = [pending + (high - pending) * i // pieces for i in range(pieces + 1)]
            yield from zip(cuts, cuts[1:-1], strict=False)
            pending = cuts[-2]
        at = high
    if at > pending:
        yield pending, at


def make_plan(
    shards: Sequence[Shard],
    base: dict[str, Any],
    unit_rows: int,
    fields: Sequence[tuple[str, str]] = (),
    limit: int | None = None,
    max_groups: int = 256,
    before: Sequence[Plan] = (),
) -> Plan:
    """The plan of a fresh output, or, after the plans `before`, a plan of the rows that are not planned yet.

    Raises PlanChanged if an earlier plan has other settings or another content of a shard.
    """
    known: dict[str, PlannedShard] = {}
    done: dict[str, list[tuple[int, int]]] = {}
    for plan in before:
        check_base(plan.base, base)
        known |= {shard.path: shard for shard in plan.shards}
        for unit in plan.units:
            done.setdefault(unit.path, []).append((unit.start, unit.stop))
    check_shards(known, shards)
    groups = _assign_groups(shards, known, max_groups)
    wanted = wanted_ranges(shards, limit)
    units = []
    for shard in shards:
        for start, stop in _missing(done.get(shard.path, []), wanted.get(shard.path, 0)):
            for a, b in cut_range(start, stop, shard.row_groups, unit_rows):
                units.append(
                    WorkUnit(unit_id(shard.path, shard.content_key, a, b), shard.path, a, b, groups[shard.path])
                )
    planned = tuple(PlannedShard(s.path, s.content_key, s.rows or 0, groups[s.path], s.error) for s in shards)
    return Plan(len(before) + 1, base, unit_rows, tuple(fields), tuple(units), planned)


def _missing(done: list[tuple[int, int]], wanted: int) -> Iterator[tuple[int, int]]:
    at = 0
    for start, stop in sorted(done):
        if start > at:
            yield at, min(start, wanted)
        at = max(at, stop)
    if wanted > at:
        yield at, wanted


def _assign_groups(shards: Sequence[Shard], known: dict[str, PlannedShard], max_groups: int) -> dict[str, str]:
    """Path -> group. Consecutive shards share a group. A planned shard keeps its group; new shards get new groups."""
    groups = {path: shard.group for path, shard in known.items()}
    fresh = [shard.path for shard in shards if shard.path not in groups]
    first = 1 + max((int(group[1:]) for group in groups.values()), default=-1)
    count = min(len(fresh), max_groups)
    for i, path in enumerate(fresh):
        groups[path] = f"g{first + i * count // len(fresh):05d}"
    return groups


def check_base(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises PlanChanged naming every parameter that differs, with both values."""
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if changed:
        what = "; ".join(f"{key}: was {_short(old.get(key))}, now {_short(new.get(key))}" for key in changed)
        raise PlanChanged(
            f"this output was begun with other settings ({what}); restore them, or choose a new output.path"
        )


def check_shards(known: dict[str, PlannedShard], shards: Sequence[Shard]) -> None:
    """Raises PlanChanged naming the first shard that changed since it was planned, or that was planned under another path."""
    for shard in shards:
        old = known.get(shard.path)
        if old and old.content_key != shard.content_key:
            raise PlanChanged(
                f"{shard.path}: the input file changed since this output was planned ({old.rows} rows then, {shard.rows} "
                "now); restore it, or choose a new output.path"
            )
    listed = {shard.path for shard in shards}
    gone = {
        old.content_key: old.path for old in known.values() if old.path not in listed and old.content_key and old.rows
    }
    for shard in shards:
        # The input root changed, or the order of several roots did. Row ids begin with the path, so the same rows would be
        # fused and stored a second time.
        if shard.path not in known and shard.content_key in gone:
            raise PlanChanged(
                f"{shard.path}: this output was planned with the same file as {gone[shard.content_key]}; give input.path as it was then "
                "(new paths go behind it), or choose a new output.path"
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"


def refuse_lost_input(units: Sequence[WorkUnit], shards: Sequence[Shard]) -> None:
    """Raises SourceError if a shard that holds rows of `units` was deleted or can no longer be read."""
    gone = sorted({unit.path for unit in units} - {shard.path for shard in shards if not shard.error})
    if gone:
        raise SourceError(
            f"{gone[0]}: units that are not done need this shard, and it can no longer be read ({len(gone)} such shards); restore it"
        )


def read_tasks(units: Iterable[WorkUnit], row_groups: dict[str, Sequence[int]]) -> list[list[WorkUnit]]:
    """The units of each read task, in plan order. `row_groups`: path of a shard -> rows of each of its row groups.

    Neighbours that share a row group (or a text file) form one read task, so that the row group is decoded once and not
    once per unit.
    """
    out: list[list[WorkUnit]] = []
    for unit in units:
        last = out[-1][-1] if out else None
        if last and last.path == unit.path and _share_group(last, unit, row_groups.get(unit.path, ())):
            out[-1].append(unit)
        else:
            out.append([unit])
    return out


def _share_group(a: WorkUnit, b: WorkUnit, row_groups: Sequence[int]) -> bool:
    edge = 0
    for rows in row_groups or (b.stop,):
        edge += rows
        if a.stop <= edge:  # this row group holds the last row of a
            return b.start < edge
    return False
