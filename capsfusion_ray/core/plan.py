"""Cut input shards into WorkUnits, and say what that will cost. Pure: knows no Ray, no network, no clock."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from capsfusion_ray.config import fingerprint
from capsfusion_ray.core.parquet import open_parquet
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.errors import AccountingError, PlanChanged, SourceError

PLAN_VERSION = 1
MAX_PARTITIONS = 1000
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
    """What the plan must know of an input file (see sources.Shard): nothing of where it lies or how it is opened."""

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
    """What a plan remembers of a shard, to tell a changed input from a new one."""

    path: str
    content_key: str
    rows: int
    group: str
    error: str = ""


@dataclass(frozen=True)
class Plan:
    """All units of one revision of a run, the shards they were cut from, and what decides the output."""

    revision: int
    base: dict[str, Any]  # the parts of the base fingerprint, by the config key a user would change
    unit_rows: int
    fields: tuple[tuple[str, str], ...]  # reference and passthrough columns: (name, arrow type), frozen at revision 1
    units: tuple[WorkUnit, ...]
    shards: tuple[PlannedShard, ...]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.base)

    @property
    def rows(self) -> int:
        return sum(unit.rows for unit in self.units)

    def to_bytes(self) -> bytes:
        """One parquet object: a row a unit, everything else in the schema's metadata."""
        header = {
            "version": PLAN_VERSION,
            "revision": self.revision,
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
        """Raises AccountingError for a plan of another version of this program."""
        table = open_parquet(io.BytesIO(data)).read()
        header = json.loads((table.schema.metadata or {})[b"capsfusion_plan"])
        if header["version"] != PLAN_VERSION:
            raise AccountingError(
                f"plan version {header['version']}: this program reads version {PLAN_VERSION}; finish the run with the "
                "program that began it, or choose a new output.path"
            )
        units = tuple(WorkUnit(**row) for row in table.to_pylist())
        shards = tuple(PlannedShard(**shard) for shard in header["shards"])
        fields = tuple((name, type_) for name, type_ in header["fields"])
        return cls(header["revision"], header["base"], header["unit_rows"], fields, units, shards)


# ------------------------------------------------------------------------------------------------------------- cutting


def unit_id(path: str, content_key: str, start: int, stop: int) -> str:
    return hashlib.sha256(f"{path}\0{content_key}\0{start}\0{stop}".encode()).hexdigest()[:20]


def wanted_ranges(shards: Sequence[Shard], limit: int | None) -> dict[str, int]:
    """Rows to take from the start of each shard: all, or `limit` spread evenly over the readable shards.

    Monotone: a larger limit takes at least the rows that a smaller one took of every shard, so a pilot's captions are
    reused by the full run.
    """
    readable = [shard for shard in shards if not shard.error and shard.rows]
    rows = {shard.path: shard.rows or 0 for shard in readable}
    if limit is None:
        return rows
    # Water-filling: the shards with the fewest rows are asked first, each for an even share of what is left.
    left = limit
    taken: dict[str, int] = {}
    by_rows = sorted(rows, key=lambda path: (rows[path], path))
    for position, path in enumerate(by_rows):
        taken[path] = min(rows[path], left // (len(by_rows) - position))
        left -= taken[path]
    return taken


def cut_range(start: int, stop: int, row_groups: Sequence[int], unit_rows: int) -> Iterator[tuple[int, int]]:
    """Cut rows [start, stop) into units of about `unit_rows`, along row-group borders where these are near.

    Small row groups are gathered up to unit_rows; a large one is cut evenly (its units share one decode: see spans).
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
    """The plan of a fresh output, or (with `before`: its earlier plans) of what was not planned yet.

    Raises PlanChanged where an earlier plan holds other parameters or another content of a shard.
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
    """Consecutive shards share a group; a shard keeps the group it once had, new shards get new groups."""
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
    """Raises PlanChanged naming the first shard whose content is not what was planned, or that was planned under another path."""
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
        # Another root, or other roots before it: row ids begin with the path, so all its rows would be fused and stored again.
        if shard.path not in known and shard.content_key in gone:
            raise PlanChanged(
                f"{shard.path}: this output was planned with the same file as {gone[shard.content_key]}; give input.path as it was then, "
                "with more behind it, or choose a new output.path"
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"


def refuse_lost_input(units: Sequence[WorkUnit], shards: Sequence[Shard]) -> None:
    """Raises SourceError where a shard that holds rows of `units` is gone or no longer readable."""
    gone = sorted({unit.path for unit in units} - {shard.path for shard in shards if not shard.error})
    if gone:
        raise SourceError(
            f"{gone[0]}: needed for units that are not done, and no longer readable ({len(gone)} such shards); restore it"
        )


def spans(units: Iterable[WorkUnit], row_groups: dict[str, Sequence[int]]) -> list[list[WorkUnit]]:
    """Units that must be decoded together: neighbours that share a row group (or a stream file), in plan order.

    Each span is one read task, so that no row group is decoded once a unit.
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
        if a.stop <= edge:  # the group that holds a's last row
            return b.start < edge
    return False


# ------------------------------------------------------------------------------------------------------------ the price


@dataclass(frozen=True)
class Estimate:
    """What a run will take; `captions_per_s` is of one actor."""

    rows: int  # still to do
    units: int
    actors: int
    captions_per_s: float
    prompt_tokens: float  # mean, a row
    output_tokens: float  # mean, a row
    gpus_per_actor: float
    price_per_gpu_hour: float
    speed_source: str  # where captions_per_s comes from
    errors: dict[str, str] = field(default_factory=dict)  # unreadable shards
    rows_done: int = 0  # committed in the output already
    preempted_every_h: float | None = None  # mean hours that an actor lives; None: to the end
    restart_s: float = 0.0  # from an actor's death to the first caption of the one that replaces it
    together: float = 0.0  # captions that an actor writes at a time

    @property
    def unit_s(self) -> float:
        """Of one actor."""
        return self.rows / self.units / self.captions_per_s if self.units else 0.0

    @property
    def lost_s(self) -> float:
        """Work that a death destroys: of the unit whose captions begin now, a half on average, and the last one's where it drains still."""
        return self.unit_s / 2 + self.drain_s

    @property
    def drain_s(self) -> float:
        """From when a unit's last caption begins, and with it the next unit, to when it ends."""
        return DRAIN * self.together / self.captions_per_s

    @property
    def seconds(self) -> float:
        """All actors' work and waiting, and the tail, while some have nothing left to do. Checked against simulated pools in tests/rules."""
        if not self.rows:
            return 0.0
        gone_s = self.lost_s + self.restart_s
        # The chance that an actor dies while the last units are at work: they wait for its successor, and are begun anew.
        late = 1 - math.exp(-self.actors * gone_s / (self.preempted_every_h * 3600)) if self.preempted_every_h else 0.0
        # The last units end anywhere in one unit's time. One actor waits for nobody.
        tail = self.drain_s + (1 - 1 / self.actors) * (
            0.5 * self.unit_s + late * (0.6 * self.unit_s + self.drain_s + self.restart_s)
        )
        return self.rows / (self.captions_per_s * self.actors) / (1 - self._share(gone_s)) + tail

    def _share(self, seconds: float) -> float:
        """Of an actor's life, where each death takes so much of it; at most MOST_LOST: beyond, nothing would ever be finished."""
        return min(seconds / (self.preempted_every_h * 3600), MOST_LOST) if self.preempted_every_h else 0.0

    @property
    def gpu_hours(self) -> float:
        """Engines at work, on what preemption destroys too. Nodes that start, load a model or wait are not in it."""
        return self.rows / self.captions_per_s / (1 - self._share(self.lost_s)) / 3600 * self.gpus_per_actor

    @property
    def price(self) -> float:
        return self.gpu_hours * self.price_per_gpu_hour

    @property
    def captions_per_gpu_hour(self) -> float | None:
        return round(self.captions_per_s * 3600 / self.gpus_per_actor, 1) if self.gpus_per_actor else None

    def text(self) -> str:
        """For people: what will happen, how long it takes and what it costs."""
        done = f"; {self.rows_done:,} are done already" if self.rows_done else ""
        if not self.rows and done:
            return f"nothing is left to do: all {self.rows_done:,} planned rows are done"
        lines = [
            f"rows            {self.rows:,} in {self.units:,} units{done}",
            f"tokens a row    {self.prompt_tokens:.0f} prompt, {self.output_tokens:.0f} output (sampled)",
            f"actors          {self.actors} with {self.gpus_per_actor:g} GPU each, {self.captions_per_s:g} captions/s each ({self.speed_source})",
            f"time            {_span_of_time(self.seconds)} from the first caption to the last",
            f"GPU-hours       {self.gpu_hours:,.1f}, {self.price:,.2f} USD at {self.price_per_gpu_hour:g} an hour"
            if self.gpus_per_actor
            else "GPU-hours       none: on CPUs (cluster.gpus_per_actor=1 for a GPU's quote)",
        ]
        if self.preempted_every_h:
            deaths = self.seconds * self.actors / (self.preempted_every_h * 3600)
            lost = f"a restart of {self.restart_s:g} s and {self.lost_s:.0f} s of work each"
            lines.append(f"preempted       {deaths:,.0f} times (an actor lives {self.preempted_every_h:g} h): {lost}")
        lines += [f"unreadable      {path}: {error}" for path, error in self.errors.items()]
        return "\n".join(lines)


def _span_of_time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:,.0f} minutes"
    return f"{seconds / 3600:,.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"
