"""Write a new edition of single groups: new data files for the rows that change, then the group's entry.

Data files without a changed row stay as they are. A step that is repeated after a kill writes the same bytes again. What
changes is decided elsewhere: see merge_retried, mark_repeated, replace_units and takedown. Knows the store; no Ray.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from capsfusion_ray.config import OutputConfig
from capsfusion_ray.core.accounting import UnitSummary
from capsfusion_ray.dataset.compaction import check_group
from capsfusion_ray.dataset.data_files import FileSet
from capsfusion_ray.dataset.layout import of_edition
from capsfusion_ray.dataset.manifest import FileEntry, GroupEntry
from capsfusion_ray.dataset.read_rows import RowReader
from capsfusion_ray.storage import Store

THREADS = 4  # each holds one file in memory

Change = tuple[dict[str, pa.Table], UnitSummary]  # the rows by kind of file, and the unit's new summary


@dataclass(frozen=True)
class Rewriter:
    """Writes one edition. `fields`: the plan's reference and passthrough columns; `output`: how files are cut."""

    store: Store
    edition: int
    fields: tuple[tuple[str, str], ...]
    output: OutputConfig

    @property
    def reader(self) -> RowReader:
        return RowReader(self.store, self.fields, self.output.partition_by)

    def new_files(self, entry: GroupEntry) -> FileSet:
        """The data files of the group in this edition, to write to."""
        return FileSet(self.store, entry.group, of_edition(self.edition, entry.plan), self.fields, self.output)

    def write_entry(self, old: GroupEntry, summaries: dict[str, UnitSummary], files: Sequence[FileEntry]) -> GroupEntry:
        """Write the group's entry of this edition. Raises AccountingError unless `files` hold what `summaries` count."""
        entry = dataclasses.replace(old, units=tuple(summaries.values()), files=tuple(files), edition=self.edition)
        for unit in entry.units:
            unit.check()
        check_group(entry)
        self.store.put(entry.path, entry.to_bytes())
        return entry

    def change_rows(
        self,
        entry: GroupEntry,
        is_hit: Callable[[pa.Table], pa.Array],
        change: Callable[[str, pa.Table, pa.Array, UnitSummary], Change],
    ) -> GroupEntry | None:
        """Rewrite the data files that hold a row for which `is_hit` is true; None where the group has no such row.

        `change` gets the kind of file, one unit's rows in that file, which of them are hit, and the unit's summary.
        """
        files = self.new_files(entry)
        summaries = {unit.id: unit for unit in entry.units}
        untouched: list[FileEntry] = []
        for file in entry.files:
            pieces = [(unit_id, rows, pc.fill_null(is_hit(rows), False)) for unit_id, rows in self.reader.rows_of(file)]
            if not any(pc.any(hits).as_py() for _, _, hits in pieces):
                untouched.append(file)
                continue
            for unit_id, rows, hits in pieces:
                tables, summaries[unit_id] = change(file.kind, rows, hits, summaries[unit_id])
                for kind, table in tables.items():
                    files.write(kind, unit_id, table)
        if len(untouched) == len(entry.files):
            return None
        return self.write_entry(entry, summaries, (*untouched, *files.close()))

    def each(
        self,
        entries: Sequence[GroupEntry],
        change: Callable[[GroupEntry], GroupEntry | None],
        may_write: Callable[[], None],
    ) -> list[GroupEntry]:
        """Apply `change` to every group that has no entry of this edition yet; all entries, in the order given.

        `may_write` is called before each group and raises where this driver may not write any more (Lease.check).
        """

        def one(entry: GroupEntry) -> GroupEntry:
            may_write()
            return entry if entry.edition == self.edition else change(entry) or entry

        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(one, entries))
