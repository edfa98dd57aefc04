"""Replace all rows of some units of a group by the rows of their recomputed parts: the merge of a repair."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pyarrow as pa

from capsfusion_ray.core.repeated_captions import Repeated
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.dataset.layout import DATA_DIR, REJECTED_DIR
from capsfusion_ray.dataset.manifest import FileEntry, GroupEntry
from capsfusion_ray.dataset.mark_repeated import read_marked_part
from capsfusion_ray.dataset.read_rows import RowReader
from capsfusion_ray.dataset.rewriter import Rewriter
from capsfusion_ray.dataset.unit_files import split_part
from capsfusion_ray.storage import Store


def replace_units(
    rewriter: Rewriter, entry: GroupEntry, parts: Store, units: Sequence[WorkUnit], repeated: Repeated
) -> GroupEntry:
    """Rewrite every data file that holds a row of `units`, with the rows of their `parts`; the new entry.

    Files that hold other units' rows too must be readable, or these units be among `units`. Rows of the parts that have
    one of the `repeated` captions are marked.
    """
    again = {unit.id: unit for unit in units}
    touched = [file for file in entry.files if any(unit_id in again for unit_id, _ in file.units)]
    untouched = [file for file in entry.files if file not in touched]
    carried = _rows_of_others(rewriter.reader, touched, again)
    files = rewriter.new_files(entry)
    summaries = {unit.id: unit for unit in entry.units}
    for unit_id in summaries:
        if unit_id in again:
            part, summaries[unit_id] = read_marked_part(parts, again[unit_id], repeated)
            data, rejected = split_part(part)
            files.write(DATA_DIR, unit_id, data)
            files.write(REJECTED_DIR, unit_id, rejected)
        else:
            for kind, rows in carried.get(unit_id, ()):
                files.write(kind, unit_id, rows)
    return rewriter.write_entry(entry, summaries, (*untouched, *files.close()))


def _rows_of_others(
    reader: RowReader, files: Sequence[FileEntry], again: Collection[str]
) -> dict[str, list[tuple[str, pa.Table]]]:
    """Unit id -> (kind of file, rows) of the units in `files` that are not recomputed."""
    rows_of_unit: dict[str, list[tuple[str, pa.Table]]] = {}
    for file in files:
        if any(unit_id not in again for unit_id, _ in file.units):
            for unit_id, rows in reader.rows_of(file):
                rows_of_unit.setdefault(unit_id, []).append((file.kind, rows))
    return rows_of_unit
