"""Read the state of an output, and draw a limited, deterministic sample of its rows, stratified by reason."""

from __future__ import annotations

import bisect
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from capsfusion_ray.config import read_saved
from capsfusion_ray.core.accounting import Counts, UnitSummary
from capsfusion_ray.core.columns import DETAIL, FLAGS, FUSED, OUTCOME, RAW, REASON, ROW_ID, SYNTHETIC, URL
from capsfusion_ray.core.parquet import open_parquet
from capsfusion_ray.dataset.layout import DATA_FOLDERS, PROGRESS, UNITS_DIR, config_path, part_path
from capsfusion_ray.dataset.manifest import FileEntry, read_groups, read_manifest
from capsfusion_ray.dataset.plan_files import read_plans
from capsfusion_ray.dataset.unit_files import committed, read_summaries
from capsfusion_ray.storage import Store, read_note

T = TypeVar("T")
FILES_READ = 48  # files read per folder, spread over all its files
ROWS_READ = 96_000  # rows read per folder, spread over these files and their row groups; a small output is read whole
ROWS_FOUND = 2 * ROWS_READ  # rows read of another output, to find the same rows in it
BATCH_ROWS = 2_000
MEASURED_ROWS = 5_000  # rows for the figures: lengths, diversity and shares
ORDINARY = "ordinary"  # the stratum of captions without a reason or flag
DIFFERENT, EQUAL = "different", "equal"  # further strata of rows of two outputs
ORDINARY_SHARE = 10  # so many times as many ordinary rows are shown as rows of one reason


@dataclass(frozen=True)
class State:
    """The counts of an output, whether it is finished, and where its rows are."""

    counts: Counts
    finished: bool
    unreadable_shards: dict[str, str]
    revisions: tuple[dict[str, Any], ...]
    cost: dict[str, float | None]  # gpus_per_actor and usd_per_gpu_hour of the last run; None if unknown
    base: dict[str, Any]
    devices: dict[str, int]  # device -> number of units
    busy_s: float  # seconds that the engines were busy, summed over all of them
    progress: dict[str, Any]
    folders: tuple[str, ...]  # folders with files of rows
    units: tuple[UnitSummary, ...]  # the committed units
    files: tuple[FileEntry, ...]  # the data files with their rows; the rows of other units are in parts


@dataclass(frozen=True)
class Row:
    """One caption to read. `reason` and `detail` are empty for rows of data/. `other` is the same row of another output."""

    id: str
    url: str
    raw: str
    synthetic: str
    fused: str
    flags: tuple[str, ...]
    reason: str
    detail: str
    other: Row | None = None

    @property
    def strata(self) -> tuple[str, ...]:
        own = (self.reason,) if self.reason else self.flags or (ORDINARY,)
        if self.other is None:
            return own
        return (DIFFERENT if self.fused != self.other.fused else EQUAL, *dict.fromkeys((*own, *self.other.strata)))


def state_of(store: Store) -> State | None:
    """Read the state of an output, finished or running. Returns None for a folder without a plan."""
    plans = read_plans(store)
    if not plans:
        return None
    progress = read_note(store, PROGRESS) or {}
    manifest = read_manifest(store)
    if manifest and len(manifest.units) == sum(len(plan.units) for plan in plans):
        counts, units, files, shards = manifest.counts, manifest.units, manifest.files, manifest.unreadable_shards
        revisions, folders = manifest.revisions, DATA_FOLDERS
        recorded: dict[str, Any] = next(
            (revision["cost"] for revision in reversed(revisions) if "cost" in revision), {}
        )
        cost = {key: recorded.get(key) for key in ("gpus_per_actor", "usd_per_gpu_hour")}
    else:
        entries = read_groups(store)
        compacted = {unit.id for entry in entries for unit in entry.units}
        waiting = committed(store) - compacted
        parts = read_summaries(store, [unit for plan in plans for unit in plan.units if unit.id in waiting])
        units = (*(unit for entry in entries for unit in entry.units), *parts)
        files = tuple(file for entry in entries for file in entry.files)
        counts = Counts.of(units, sum(plan.rows for plan in plans))
        shards = {shard.path: shard.error for plan in plans for shard in plan.shards if shard.error}
        revisions, cost, folders = (), _saved_cost(store, len(plans)), (*DATA_FOLDERS, UNITS_DIR)
    devices, busy_s = Counter(unit.device for unit in units if unit.device), sum(unit.busy_s for unit in units)
    return State(
        counts,
        counts.done == counts.planned,
        shards,
        revisions,
        cost,
        plans[0].base,
        dict(devices),
        busy_s,
        progress,
        folders,
        units,
        files,
    )


def _saved_cost(store: Store, plan_number: int) -> dict[str, float | None]:
    """Read gpus_per_actor and usd_per_gpu_hour from the saved config, for a run that has no manifest yet."""
    path = config_path(plan_number)
    saved = read_saved(store.get(path).decode()) if store.exists(path) else {}
    cluster, engine = saved.get("cluster", {}), saved.get("engine", {})
    gpus = cluster.get("gpus_per_actor")
    split = engine.get("vllm", {}).get("tensor_parallel") if engine.get("kind") == "vllm" else None
    return {
        "gpus_per_actor": _number(split if gpus is None else gpus),
        "usd_per_gpu_hour": _number(cluster.get("price_per_gpu_hour")),
    }


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


@dataclass(frozen=True)
class Sample:
    """Sampled rows, from files spread over the output. `shown` is stratified by reason; `measured`, for figures, is not."""

    shown: list[Row]
    measured: list[Row]
    compared: int = 0  # rows that another output has, too
    different: int = 0  # of these, rows whose captions differ


def draw(store: Store, state: State, per_reason: int, beside: tuple[Store, State] | None = None) -> Sample:
    """Draw at most `per_reason` rows to show per reason and flag, and ten times as many ordinary ones.

    With `beside`, another output, only rows that both outputs have are drawn, each with the other output's row.
    """
    rows: Iterable[Row] = drawn_rows(store, state)
    others: dict[str, Row] = {}
    if beside:
        rows = list(rows)
        others = find(*beside, {row.id for row in rows})
    left: Counter[str] = Counter()
    compared: Counter[bool] = Counter()
    drawn: list[Row] = []
    written: list[Row] = []
    for row in rows:
        if beside:
            if row.id not in others:
                continue
            row = replace(row, other=others[row.id])
            compared[DIFFERENT in row.strata] += 1
        if row.fused and not row.reason:
            written.append(row)
        if any(left[s] < per_reason * (ORDINARY_SHARE if s == ORDINARY else 1) for s in row.strata):
            left.update(row.strata)
            drawn.append(row)
    # Shuffled by a hash of the id: the page begins with rows of all shards, and with the same ones each time.
    shown = sorted(drawn, key=lambda row: zlib.crc32(row.id.encode("utf-8", "surrogatepass")))
    return Sample(shown, spread(written, MEASURED_ROWS), compared.total(), compared[True])


def drawn_rows(store: Store, state: State) -> Iterator[Row]:
    """Yield the rows from which a sample is drawn: a limited number, spread over all files, each once."""
    seen: set[str] = set()
    for row in chain.from_iterable(_rows(store, folder) for folder in state.folders):
        if row.id not in seen:  # while a part is compacted, its rows can be in the part and in the data file
            seen.add(row.id)
            yield row


def find(store: Store, state: State, ids: Collection[str]) -> dict[str, Row]:
    """Return the rows of an output with these ids, by id. It reads at most ROWS_FOUND rows, of the units with most of them."""
    wanted = _units_of(state, ids)
    found: dict[str, Row] = {}
    compacted: set[str] = set()
    for file in state.files:
        places, at = [], 0
        for unit_id, rows in file.units:
            if unit_id in wanted:
                places.append((at, at + rows))
                compacted.add(unit_id)
            at += rows
        if places:
            found |= _found(store, file.path, ids, places)
    for unit_id in wanted - compacted:
        found |= _found(store, part_path(unit_id), ids)
    return found


def _units_of(state: State, ids: Collection[str]) -> set[str]:
    by_path: dict[str, list[UnitSummary]] = {}
    for unit in sorted(state.units, key=lambda unit: unit.start):
        by_path.setdefault(unit.path, []).append(unit)
    hits: Counter[str] = Counter()
    sizes: dict[str, int] = {}
    for row_id in ids:
        path, _, number = row_id.rpartition(":")
        units = by_path.get(path, [])
        at = bisect.bisect_right(units, int(number), key=lambda unit: unit.start) - 1
        if at >= 0 and int(number) < units[at].stop:
            hits[units[at].id] += 1
            sizes[units[at].id] = units[at].stop - units[at].start
    chosen, rows = set(), 0
    for unit_id, _ in sorted(hits.items(), key=lambda hit: (-hit[1], hit[0])):
        chosen.add(unit_id)
        rows += sizes[unit_id]
        if rows > ROWS_FOUND:
            break
    return chosen


def _found(
    store: Store, path: str, ids: Collection[str], places: Sequence[tuple[int, int]] | None = None
) -> dict[str, Row]:
    """Return the rows of one file with these ids, by id.

    It reads only the row groups that overlap `places`, row ranges of the file; None reads all.
    """
    try:
        with store.open_input(path) as source:
            file = open_parquet(source, where=store.url(path))
            chosen, at = [], 0
            for group in range(file.num_row_groups):
                end = at + file.metadata.row_group(group).num_rows
                if places is None or any(first < end and last > at for first, last in places):
                    chosen.append(group)
                at = end
            batches = file.iter_batches(batch_size=BATCH_ROWS, row_groups=chosen, columns=_columns(file))
            rows = (_row(row) for batch in batches for row in as_bytes(batch).to_pylist())
            return {row.id: row for row in rows if row.id in ids}
    except FileNotFoundError:  # it was compacted or swept after the listing
        return {}


def _rows(store: Store, folder: str) -> Iterator[Row]:
    names = spread([file.path for file in store.list(folder) if file.path.endswith(".parquet")], FILES_READ)
    for name in names:
        try:
            with store.open_input(name) as source:
                for batch in _batches(open_parquet(source, where=store.url(name)), ROWS_READ // len(names)):
                    yield from map(_row, as_bytes(batch).to_pylist())
        except FileNotFoundError:  # it was compacted after the listing
            continue


def _batches(file: pq.ParquetFile, most: int) -> Iterator[pa.RecordBatch]:
    """Yield at most `most` rows of one file, from row groups spread over it."""
    rows, groups = file.metadata.num_rows, file.num_row_groups
    chosen = spread(list(range(groups)), max(1, -(-most * groups // max(rows, 1))))
    for batch in file.iter_batches(batch_size=min(BATCH_ROWS, most), row_groups=chosen, columns=_columns(file)):
        yield batch.slice(0, most)
        most -= batch.num_rows
        if most <= 0:
            return


def _columns(file: pq.ParquetFile) -> list[str]:
    wanted = (ROW_ID, URL, RAW, SYNTHETIC, FUSED, FLAGS, REASON, DETAIL, OUTCOME)
    return [column for column in wanted if column in file.schema_arrow.names]


def as_bytes(batch: pa.RecordBatch) -> pa.Table:
    """Convert strings to bytes, because a rejected caption may be invalid UTF-8."""
    table = pa.Table.from_batches([batch])
    for index, column in enumerate(table.schema):
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            table = table.set_column(index, column.name, table[column.name].cast(pa.large_binary()))
    return table


def _row(row: dict[str, Any]) -> Row:
    def text(name: str) -> str:
        value = row.get(name)
        return (
            "" if value is None else value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
        )

    flags = tuple(flag.decode() if isinstance(flag, bytes) else flag for flag in row.get(FLAGS) or ())
    # Only the parts have a column with the outcome. In the data files the folder tells it.
    rejected = text(OUTCOME) in ("", "rejected")
    return Row(
        text(ROW_ID),
        text(URL),
        text(RAW),
        text(SYNTHETIC),
        text(FUSED),
        flags,
        text(REASON) if rejected else "",
        text(DETAIL) if rejected else "",
    )


def spread(items: list[T], count: int) -> list[T]:
    """Return `count` items at equal distances, in order."""
    if len(items) <= count:
        return items
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
