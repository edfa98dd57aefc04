"""Compact a finished group: write its units' parts into data files, then the group's entry, then remove the parts.

Every name and every byte follows from the parts alone, so a compaction that was killed and is repeated writes the same files
again. Knows the store; no Ray.
"""

from __future__ import annotations

from collections.abc import Sequence

from capsfusion_ray.config import OutputConfig
from capsfusion_ray.core.accounting import check_stored
from capsfusion_ray.core.repeated_captions import Tally
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.dataset.data_files import FileSet
from capsfusion_ray.dataset.layout import DATA_DIR, REJECTED_DIR, group_path, of_plan
from capsfusion_ray.dataset.manifest import GroupEntry
from capsfusion_ray.dataset.unit_files import read_part, remove_parts, split_part
from capsfusion_ray.storage import Store


def compact_group(
    store: Store,
    group: str,
    plan: int,
    units: Sequence[WorkUnit],
    fields: Sequence[tuple[str, str]],
    output: OutputConfig,
) -> GroupEntry:
    """Write the data files and the entry of one group, whose `units` are all committed, and remove the parts. Repeatable.

    `plan`: the number of the plan that has these units. `fields`: its reference and passthrough columns. `output`: how the
    rows are cut into files. Raises AccountingError where rows do not add up, ConfigError for more partition values than
    data_files.MAX_PARTITIONS.
    """
    path = group_path(group, plan)
    # An earlier call may have been killed between writing the entry and removing the parts.
    entry = GroupEntry.from_bytes(store.get(path)) if store.exists(path) else None
    if entry is None:
        try:
            entry = _write_files(store, group, plan, units, fields, output)
        except FileNotFoundError:
            # Ray repeats this task on another node where the first node does not answer. The first task was quicker: it
            # has written the entry and removed the parts.
            if found := store.get_with_etag(path):
                return GroupEntry.from_bytes(found[0])
            raise
        if not store.put_if_absent(path, entry.to_bytes()):
            entry = GroupEntry.from_bytes(store.get(path))
    remove_parts(store, units)
    return entry


def _write_files(
    store: Store,
    group: str,
    plan: int,
    units: Sequence[WorkUnit],
    fields: Sequence[tuple[str, str]],
    output: OutputConfig,
) -> GroupEntry:
    files = FileSet(store, group, of_plan(plan), fields, output)
    summaries, tally = [], Tally()
    for unit in units:
        part, summary = read_part(store, unit)
        data, rejected = split_part(part)
        summaries.append(summary)
        tally.add(data)
        files.write(DATA_DIR, unit.id, data)
        files.write(REJECTED_DIR, unit.id, rejected)
    entry = GroupEntry(group, plan, tuple(summaries), files.close(), repeats=tally.most_repeated())
    check_group(entry)
    return entry


def check_group(entry: GroupEntry) -> None:
    """Raises AccountingError unless the data files hold exactly the rows that the units count."""
    stored: dict[str, list[tuple[str, int]]] = {}
    for file in entry.files:
        stored.setdefault(file.kind, []).extend(file.units)
    check_stored(entry.units, stored, f"group {entry.group}")
