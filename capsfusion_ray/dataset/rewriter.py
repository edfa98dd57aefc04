"""A new edition of a group's files: retried rejects move over, removed rows go, lost units return. Nothing else is touched.

New files first, then the group's entry; the manifest by compare-and-swap (publish), and only then the old files
(sweep). A step repeated after a kill writes the same bytes again. Knows the store; no Ray.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from capsfusion_ray.config import GateConfig, OutputConfig
from capsfusion_ray.core.accounting import UnitSummary
from capsfusion_ray.core.columns import DETAIL, FLAGS, FUSED, OUTCOME, REASON, ROW_ID, type_of_name
from capsfusion_ray.core.parquet import open_parquet
from capsfusion_ray.core.repeated_captions import REPEATED, Repeated, Tally, after_retry, holds, mark_part, repeated
from capsfusion_ray.core.types import Outcome, WorkUnit
from capsfusion_ray.dataset.compaction import check_group
from capsfusion_ray.dataset.data_files import NULL_PARTITION, FileSet
from capsfusion_ray.dataset.layout import DATA_FILE, DATA_FOLDERS, MANIFEST, RETRY_DIR, of_edition, record_path
from capsfusion_ray.dataset.manifest import FileEntry, GroupEntry, Manifest, assemble, read_groups, read_intact
from capsfusion_ray.dataset.plan_files import read_plans
from capsfusion_ray.dataset.unit_files import parts_of, read_part
from capsfusion_ray.dataset.verify import refuse_damage
from capsfusion_ray.errors import AccountingError, ConfigError
from capsfusion_ray.storage import Store

log = logging.getLogger(__name__)
THREADS = 4  # each holds one file in memory

Change = tuple[dict[str, pa.Table], UnitSummary]  # the rows by kind of file, and the unit's new summary


@dataclass(frozen=True)
class Rewriter:
    """What every rewriting of one revision shares. `fields`: the plan's extra columns."""

    store: Store
    edition: int
    fields: tuple[tuple[str, str], ...]
    output: OutputConfig

    def _files_of(self, entry: GroupEntry) -> FileSet:
        return FileSet(self.store, entry.group, of_edition(self.edition, entry.revision), self.fields, self.output)

    def retried_repeats(
        self, entry: GroupEntry, retried: Store, units: Sequence[WorkUnit], reasons: Collection[str]
    ) -> dict[str, int]:
        """The `repeats` that the entry will have once merge_retried has done the same."""
        gone, come = Tally(), Tally()
        again = {unit.id for unit in units}
        for file in entry.files if REPEATED in reasons else ():
            if file.kind == "rejected":
                for rows in (rows for unit_id, rows in self.rows_of(file) if unit_id in again):
                    gone.add(rows.filter(pc.equal(rows[REASON], REPEATED)))
        for unit in units:
            part, _ = read_part(retried, unit)
            come.add(part.filter(pc.not_equal(part[OUTCOME], str(Outcome.REJECTED))))
        return after_retry(entry.repeats, gone, come)

    def merge_retried(
        self, entry: GroupEntry, retried: Store, units: Sequence[WorkUnit], reasons: Collection[str], repeated: Repeated
    ) -> GroupEntry:
        """Move what a retry made of the rows rejected for `reasons`; its parts lie in `retried`. The new entry.

        `entry` has the `repeats` that it will have; rows that get one of the `repeated` captions are marked.
        """
        again = {unit.id: unit for unit in units}
        new_parts = {unit.id: _marked(*read_part(retried, unit), repeated) for unit in units}
        files = self._files_of(entry)
        summaries = {unit.id: unit for unit in entry.units}
        kept_rejects: dict[str, list[pa.Table]] = {}
        for file in entry.files:
            if file.kind == "rejected":
                for unit_id, rows in self.rows_of(file):
                    going = pc.is_in(rows[REASON], pa.array(list(reasons), pa.string()))
                    if unit_id not in again:
                        going = pa.array([False] * rows.num_rows)
                    else:
                        summaries[unit_id] = summaries[unit_id].without(rows.filter(going), removed=False)
                    kept_rejects.setdefault(unit_id, []).append(rows.filter(pc.invert(going)))
        for unit in entry.units:
            still = kept_rejects.get(unit.id, [])
            if unit.id in again:
                part, summary = new_parts[unit.id]
                rejected = pc.equal(part[OUTCOME], str(Outcome.REJECTED))
                files.write("data", unit.id, part.filter(pc.invert(rejected)))
                still = [*still, part.filter(rejected)]
                summaries[unit.id] = summaries[unit.id].with_retried(summary)
            if still:
                columns = [name for name in still[0].column_names if all(name in table.column_names for table in still)]
                files.write("rejected", unit.id, in_row_order([table.select(columns) for table in still]))
        untouched = [file for file in entry.files if file.kind == "data"]
        return self._new_entry(entry, summaries, (*untouched, *files.close()))

    def remove(self, entry: GroupEntry, is_removed: Callable[[pa.Table], pa.Array]) -> GroupEntry | None:
        """Rewrite the files that hold a row for which `is_removed` says true; None where there is none."""

        def out(kind: str, rows: pa.Table, going: pa.Array, unit: UnitSummary) -> Change:
            return {kind: rows.filter(pc.invert(going))}, unit.without(rows.filter(going), removed=True)

        return self._change(entry, is_removed, out)

    def mark_repeated(self, entry: GroupEntry, captions: Repeated) -> GroupEntry | None:
        """Flag or reject the rows that hold one of these captions (see repeats.py); None where none does, or all are marked."""

        def unmarked(rows: pa.Table) -> pa.Array:
            marked = pa.array([REPEATED in (flags or ()) for flags in rows[FLAGS].to_pylist()], pa.bool_())
            return pc.and_not(holds(rows, captions), marked)

        def flag(kind: str, rows: pa.Table, found: pa.Array, unit: UnitSummary) -> Change:
            marks = zip(rows[FLAGS].to_pylist(), found.to_pylist(), strict=True)
            flags = pa.array([[*(old or ()), REPEATED] if hit else old for old, hit in marks], pa.list_(pa.string()))
            marked = rows.set_column(rows.schema.get_field_index(FLAGS), FLAGS, flags)
            return {kind: marked}, unit.with_flag(REPEATED, pc.sum(found).as_py() or 0)

        def out(kind: str, rows: pa.Table, found: pa.Array, unit: UnitSummary) -> Change:
            going = rows.filter(found)
            n = going.num_rows
            details = [captions.detail(text) for text in going[FUSED].to_pylist()]
            rejects = going.append_column(REASON, pa.array([REPEATED] * n, pa.string())).append_column(
                DETAIL, pa.array(details, pa.string())
            )
            summary = unit.without(going, removed=False).with_rejects(REPEATED, n)
            return {kind: rows.filter(pc.invert(found)), "rejected": rejects}, summary

        return self._change(entry, unmarked, out if captions.reject else flag)

    def _change(
        self,
        entry: GroupEntry,
        is_hit: Callable[[pa.Table], pa.Array],
        change: Callable[[str, pa.Table, pa.Array, UnitSummary], Change],
    ) -> GroupEntry | None:
        """Rewrite the files that hold a row for which `is_hit` says true, a unit's rows at a time; None where there is none."""
        files = self._files_of(entry)
        summaries = {unit.id: unit for unit in entry.units}
        untouched: list[FileEntry] = []
        for file in entry.files:
            pieces = [(unit_id, rows, pc.fill_null(is_hit(rows), False)) for unit_id, rows in self.rows_of(file)]
            if not any(pc.any(hits).as_py() for _, _, hits in pieces):
                untouched.append(file)
                continue
            for unit_id, rows, hits in pieces:
                tables, summaries[unit_id] = change(file.kind, rows, hits, summaries[unit_id])
                for kind, table in tables.items():
                    files.write(kind, unit_id, table)
        if len(untouched) == len(entry.files):
            return None
        return self._new_entry(entry, summaries, (*untouched, *files.close()))

    def replace(self, entry: GroupEntry, parts: Store, units: Sequence[WorkUnit], repeated: Repeated) -> GroupEntry:
        """Write every file anew that holds a row of `units`, whose recomputed parts lie in `parts`. The new entry.

        Files that hold none of them stay; those that hold other units' rows too must be readable, or these be recomputed.
        Recomputed rows that get one of the `repeated` captions are marked.
        """
        again = {unit.id: unit for unit in units}
        files = self._files_of(entry)
        untouched = [file for file in entry.files if not any(unit_id in again for unit_id, _ in file.units)]
        carried: dict[str, list[tuple[str, pa.Table]]] = {}
        for file in entry.files:
            if file not in untouched and any(unit_id not in again for unit_id, _ in file.units):
                for unit_id, rows in self.rows_of(file):
                    carried.setdefault(unit_id, []).append((file.kind, rows))
        summaries = {unit.id: unit for unit in entry.units}
        for unit_id in summaries:
            if unit_id in again:
                part, summaries[unit_id] = _marked(*read_part(parts, again[unit_id]), repeated)
                rejected = pc.equal(part[OUTCOME], str(Outcome.REJECTED))
                files.write("data", unit_id, part.filter(pc.invert(rejected)))
                files.write("rejected", unit_id, part.filter(rejected))
            else:
                for kind, rows in carried.get(unit_id, ()):
                    files.write(kind, unit_id, rows)
        return self._new_entry(entry, summaries, (*untouched, *files.close()))

    def each(
        self,
        entries: Sequence[GroupEntry],
        change: Callable[[GroupEntry], GroupEntry | None],
        may_write: Callable[[], None],
    ) -> list[GroupEntry]:
        """Every entry, or what `change` made of it; groups that a killed run changed are done. `may_write`: see compactor.py."""

        def one(entry: GroupEntry) -> GroupEntry:
            may_write()
            return entry if entry.edition == self.edition else change(entry) or entry

        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(one, entries))

    def rows_of(self, file: FileEntry) -> list[tuple[str, pa.Table]]:
        """(unit id, its rows) of one file, in order, with the partition's column back in place."""
        return self.rows_in(file, read_intact(self.store, file))

    def rows_in(self, file: FileEntry, data: bytes) -> list[tuple[str, pa.Table]]:
        """The same, of a file that was read already."""
        table = open_parquet(io.BytesIO(data), where=self.store.url(file.path)).read()
        if self.output.partition_by != "shard":
            table = table.append_column(self.output.partition_by, self._partition_value(file.path, table.num_rows))
        out, at = [], 0
        for unit_id, rows in file.units:
            out.append((unit_id, table.slice(at, rows)))
            at += rows
        return out

    def _partition_value(self, path: str, rows: int) -> pa.Array:
        value = path.split("/")[1].partition("=")[2]
        type_ = type_of_name(dict(self.fields)[self.output.partition_by])
        return pa.array([None if value == NULL_PARTITION else unquote(value)] * rows, pa.string()).cast(type_)

    def _new_entry(self, old: GroupEntry, summaries: dict[str, UnitSummary], files: Sequence[FileEntry]) -> GroupEntry:
        entry = dataclasses.replace(old, units=tuple(summaries.values()), files=tuple(files), edition=self.edition)
        for unit in entry.units:
            unit.check()
        check_group(entry)
        self.store.put(entry.path, entry.to_bytes())
        return entry


def in_row_order(tables: list[pa.Table]) -> pa.Table:
    """One unit's rows of several tables, in the order of the input."""
    table = pa.concat_tables(tables, promote_options="default")
    numbers = [int(row_id.rpartition(":")[2]) for row_id in table[ROW_ID].to_pylist()]
    return table.take(pa.array(sorted(range(len(numbers)), key=numbers.__getitem__), pa.int64()))


def _marked(part: pa.Table, summary: UnitSummary, repeated: Repeated) -> tuple[pa.Table, UnitSummary]:
    """A part and its summary with the repeated captions in it flagged or rejected."""
    part, hits = mark_part(part, repeated)
    found = part.filter(hits)
    if not repeated.reject:
        return part, summary.with_flag(REPEATED, found.num_rows)
    fused_before = found.drop_columns([REASON])  # they count as rows of data/ until now
    return part, summary.without(fused_before, removed=False).with_rejects(REPEATED, found.num_rows)


def judge_repeats(
    rewriter: Rewriter, entries: Sequence[GroupEntry], gate: GateConfig, may_write: Callable[[], None]
) -> list[GroupEntry]:
    """Mark the captions that the whole run repeats too often; the entries, those of groups that hold one in a new edition.

    Repeated after a kill it finds the same captions: what was marked still counts. `may_write`: see compactor.py.
    """
    if gate.action == "ignore":
        return list(entries)
    fused = sum(unit.fused + unit.reasons.get(REPEATED, 0) for entry in entries for unit in entry.units)
    captions = repeated((entry.repeats for entry in entries), fused, gate.threshold)
    if not captions:
        return list(entries)
    log.warning(
        "captions that different pairs share, %d pairs or more: %d; action: %s",
        min(captions.values()),
        len(captions),
        gate.action,
    )
    marks = Repeated(captions, gate.action == "reject")
    return rewriter.each(entries, lambda entry: rewriter.mark_repeated(entry, marks), may_write)


def publish(store: Store, before: Manifest, etag: str, revision: dict[str, Any]) -> Manifest:
    """Swap in the manifest of the last editions. Raises AccountingError where it changed meanwhile."""
    manifest = assemble(read_plans(store), read_groups(store), [*before.revisions, revision])
    if store.put_if_match(MANIFEST, manifest.to_bytes(), etag) is None:
        raise AccountingError(
            f"{store.url(MANIFEST)}: changed under this run by another driver; run the same command again"
        )
    return manifest


def sweep(store: Store, manifest: Manifest) -> int:
    """Remove the files of earlier editions; how many. The lease must be held, and no revision be begun.

    Files of a group without an entry stay: they may be written this moment, by a driver that does not know yet that it
    lost its lease, and its entry would name them.
    """
    entries = read_groups(store)
    held = {file.path for file in manifest.files} | {file.path for entry in entries for file in entry.files}
    compacted = {(entry.revision, entry.group) for entry in entries}
    stale = []
    for path in (file.path for folder in DATA_FOLDERS for file in store.list(folder) if file.path not in held):
        name = DATA_FILE.fullmatch(path)
        if name is None:
            continue
        number, group = int(name["number"]), name["group"] or name["shard"]
        if (number, group) in compacted if name["kind"] == "r" else number <= len(manifest.revisions):
            stale.append(path)
    store.delete(stale)
    return len(stale)


def clean(store: Store, manifest: Manifest) -> int:
    """Remove earlier editions' files, merged parts and what killed writers left; how many files of the dataset. As for sweep."""
    swept = sweep(store, manifest)
    store.delete_leftovers()
    store.delete([file.path for file in store.list(RETRY_DIR)])
    return swept


# ------------------------------------------------------------------------------------- one revision, begun and finished


def as_begun(output: OutputConfig, manifest: Manifest) -> OutputConfig:
    """How the output was cut into files when it was begun: a rewrite must not cut it otherwise."""
    cut = {key.partition(".")[2]: value for key, value in manifest.base.items() if key.startswith("output.")}
    return OutputConfig(output.path, storage=output.storage, **cut)


def begin(store: Store, manifest: Manifest, record: dict[str, Any], rewritten: Sequence[FileEntry] = ()) -> int:
    """The edition to write: the one that a killed run of this very `record` began, or the next one, noted as begun.

    A retry whose rows do not stand in the dataset yet gives way to one with other settings: its model may not have loaded.
    Raises ConfigError where another revision, or an extension, was begun and not finished; AccountingError where one of
    `rewritten`, the files whose rows it will write anew, is damaged: begun, it could not be finished.
    """
    left = {unit.id for plan in read_plans(store) for unit in plan.units} - {unit.id for unit in manifest.units}
    if left:
        raise ConfigError(
            f"{store.root}: {len(left)} units that its input gained are not fused yet; run the fuse command as before, then this one"
        )
    edition = len(manifest.revisions) + 1
    text = json.dumps(record, sort_keys=True, indent=1).encode()
    if not begun(store, manifest):
        refuse_damage(store, rewritten, f"a {record['kind']}")
    if not store.put_if_absent(record_path(edition), text):
        other = json.loads(store.get(record_path(edition)))
        if other == json.loads(text):
            return edition
        if other["kind"] == record["kind"] == "retry" and not any(
            entry.edition == edition for entry in read_groups(store)
        ):
            log.warning(
                "the retry that was begun here (%s) is given up: nothing of it stands in the dataset yet", _short(other)
            )
            given_up = parts_of(store, edition)
            given_up.delete([file.path for file in given_up.list()])
            store.put(record_path(edition), text)
        else:
            raise ConfigError(
                f"{store.root}: a {other['kind']} was begun and not finished; run it again first ({_short(other)}{_other_settings(other, record)})"
            )
    return edition


def sweep_if_idle(store: Store, manifest: Manifest) -> None:
    """Finish what a kill between the manifest and the removal of the old files left."""
    if not store.exists(record_path(len(manifest.revisions) + 1)):
        sweep(store, manifest)


def refuse_unfinished(store: Store, manifest: Manifest | None) -> None:
    """Raises ConfigError where a retry, takedown or repair was begun and not finished: its new files stand in the dataset."""
    record = begun(store, manifest) if manifest else None
    if record:
        raise ConfigError(
            f"{store.root}: a {record['kind']} was begun and not finished; run it again first ({_short(record)})"
        )


def begun(store: Store, manifest: Manifest) -> dict[str, Any] | None:
    """The record of the revision that was begun and not finished, if there is one."""
    path = record_path(len(manifest.revisions) + 1)
    record: dict[str, Any] | None = json.loads(store.get(path)) if store.exists(path) else None
    return record


def _other_settings(record: dict[str, Any], asked: dict[str, Any]) -> str:
    old, new = record.get("settings", {}), asked.get("settings", {})
    return "".join(
        f"; {key}: was {json.dumps(old.get(key))[:80]}" for key in sorted(old) if new and old[key] != new.get(key)
    )


def _short(record: dict[str, Any]) -> str:
    text = ", ".join(f"{key}={value}" for key, value in record.items() if key not in ("kind", "settings"))
    return text if len(text) <= 200 else text[:199] + "…"
