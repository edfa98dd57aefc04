"""A finished group's parts -> the dataset's files, then one group entry, then the parts are removed.

Every name and every byte follows from the parts alone, so that a compaction killed half way and repeated writes the
same files over again. Knows the store; no Ray.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow.compute as pc

from capsfusion_ray.config import OutputConfig
from capsfusion_ray.core.accounting import check_stored
from capsfusion_ray.core.columns import OUTCOME
from capsfusion_ray.core.repeated_captions import Tally
from capsfusion_ray.core.types import Outcome, WorkUnit
from capsfusion_ray.dataset.data_files import FileSet
from capsfusion_ray.dataset.layout import group_path, of_plan, part_path
from capsfusion_ray.dataset.manifest import GroupEntry
from capsfusion_ray.dataset.unit_files import read_part
from capsfusion_ray.storage import Store


def compact_group(
    store: Store,
    group: str,
    revision: int,
    units: Sequence[WorkUnit],
    fields: Sequence[tuple[str, str]],
    output: OutputConfig,
) -> GroupEntry:
    """Write the files of one group whose units are all committed, its entry, and remove its parts. Repeatable.

    Raises AccountingError where rows do not add up, ConfigError for more than MAX_PARTITIONS partition values.
    """
    entry_path = group_path(group, revision)
    if store.exists(entry_path):  # killed between the entry and the removal of the parts
        entry = GroupEntry.from_bytes(store.get(entry_path))
        remove_parts(store, units)
        return entry
    files = FileSet(store, group, of_plan(revision), fields, output)
    summaries, tally = [], Tally()
    for unit in units:
        try:
            table, summary = read_part(store, unit)
        except FileNotFoundError:
            # A copy of this task (Ray runs it anew where a node fell silent) was quicker, and its entry stands.
            if found := store.get_with_etag(entry_path):
                return GroupEntry.from_bytes(found[0])
            raise
        summaries.append(summary)
        rejected = pc.equal(table[OUTCOME], str(Outcome.REJECTED))
        data = table.filter(pc.invert(rejected))
        tally.add(data)
        files.write("data", unit.id, data)
        files.write("rejected", unit.id, table.filter(rejected))
    entry = GroupEntry(group, revision, tuple(summaries), files.close(), repeats=tally.most_repeated())
    check_group(entry)
    if not store.put_if_absent(entry_path, entry.to_bytes()):
        entry = GroupEntry.from_bytes(store.get(entry_path))
    remove_parts(store, units)
    return entry


def check_group(entry: GroupEntry) -> None:
    """Raises AccountingError unless the files hold exactly the units' rows."""
    stored: dict[str, list[tuple[str, int]]] = {}
    for file in entry.files:
        stored.setdefault(file.kind, []).extend(file.units)
    check_stored(entry.units, stored, f"group {entry.group}")


def remove_parts(store: Store, units: Sequence[WorkUnit]) -> None:
    """Remove the parts of units whose group entry stands; a part that is gone already is no error."""
    store.delete([part_path(unit.id) for unit in units])
