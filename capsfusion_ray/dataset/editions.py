"""Publish the newest edition of every group, and remove the files of earlier ones. Knows the store; no Ray.

The order is what makes a kill harmless: new data files, then their group's entry, then the manifest by compare-and-swap,
and the old files last.
"""

from __future__ import annotations

from typing import Any

from capsfusion_ray.dataset.layout import DATA_FILE, DATA_FOLDERS, RETRY_DIR
from capsfusion_ray.dataset.manifest import Manifest, assemble, read_groups, swap_manifest
from capsfusion_ray.dataset.plan_files import read_plans
from capsfusion_ray.storage import Store


def publish(store: Store, before: Manifest, revision: dict[str, Any]) -> Manifest:
    """Swap in the manifest of the newest editions; `revision` is added to its revisions.

    Raises AccountingError where the manifest is not `before` any more.
    """
    manifest = assemble(read_plans(store), read_groups(store), [*before.revisions, revision])
    swap_manifest(store, before, manifest)
    return manifest


def sweep(store: Store, manifest: Manifest) -> int:
    """Remove the data files of earlier editions; how many. Needs the lease, and no edit may be unfinished.

    Data files of a group without an entry stay: a driver that does not know yet that it lost its lease may be writing
    them, and its entry will name them.
    """
    entries = read_groups(store)
    held = {file.path for file in manifest.files} | {file.path for entry in entries for file in entry.files}
    compacted = {(entry.plan, entry.group) for entry in entries}
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
    """Sweep, and remove merged parts and the temporary files of killed writers; how many data files went. As for sweep."""
    swept = sweep(store, manifest)
    store.delete_leftovers()
    store.delete([file.path for file in store.list(RETRY_DIR)])
    return swept
