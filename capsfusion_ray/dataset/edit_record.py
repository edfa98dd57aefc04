"""The record of an edit (retry, repair or takedown) that was begun: one edit of an output at a time, and its edition's number.

The record is written before the edit's first file, so that after a kill only the same command can continue it. Knows the store.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from capsfusion_ray.config import OutputConfig
from capsfusion_ray.dataset.damage import refuse_damage
from capsfusion_ray.dataset.editions import sweep
from capsfusion_ray.dataset.layout import record_path
from capsfusion_ray.dataset.manifest import FileEntry, Manifest, read_groups
from capsfusion_ray.dataset.plan_files import read_plans
from capsfusion_ray.dataset.unit_files import parts_of
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.storage import Store, decode_note, read_note

log = logging.getLogger(__name__)


def begin_edit(store: Store, manifest: Manifest, record: dict[str, Any], rewritten: Sequence[FileEntry] = ()) -> int:
    """Write the edit's `record`, which has a `kind`; the number of the edition that the edit writes.

    The same edit, begun by a process that was killed, is continued. A retry that has no row in the dataset yet is
    replaced by a retry with other settings: its model may not have loaded. `rewritten`: the data files whose rows the edit
    writes to new files.

    Raises ConfigError where another edit or an extension is unfinished, AccountingError where one of `rewritten` is
    damaged: an edit that was begun could not be finished then.
    """
    _refuse_unfinished_extension(store, manifest)
    edition = len(manifest.revisions) + 1
    text = json.dumps(record, sort_keys=True, indent=1).encode()
    if not unfinished_edit(store, manifest):
        refuse_damage(store, rewritten, f"a {record['kind']}")
    if not store.put_if_absent(record_path(edition), text):
        other = decode_note(store.get(record_path(edition)))
        if other != decode_note(text):
            _replace_retry(store, edition, other, record)
            store.put(record_path(edition), text)
    return edition


def _refuse_unfinished_extension(store: Store, manifest: Manifest) -> None:
    left = {unit.id for plan in read_plans(store) for unit in plan.units} - {unit.id for unit in manifest.units}
    if left:
        raise ConfigError(
            f"{store.root}: {len(left)} units that were added to its input are not fused yet; run the fuse command that added "
            "them again, and then this command"
        )


def _replace_retry(store: Store, edition: int, other: dict[str, Any], record: dict[str, Any]) -> None:
    """Remove the parts of the retry `other`. Raises ConfigError unless both are retries and no row of `other` is merged."""
    merged = any(entry.edition == edition for entry in read_groups(store))
    if merged or not other["kind"] == record["kind"] == "retry":
        raise ConfigError(
            f"{store.root}: a {other['kind']} was begun and not finished ({_short(other)}{_other_settings(other, record)}); "
            "run its command again first"
        )
    log.warning(
        "the unfinished retry (%s) is replaced by this one: none of its rows is in the dataset yet", _short(other)
    )
    parts = parts_of(store, edition)
    parts.delete([file.path for file in parts.list()])


def unfinished_edit(store: Store, manifest: Manifest) -> dict[str, Any] | None:
    """The record of the edit that was begun and not finished; None where there is none."""
    return read_note(store, record_path(len(manifest.revisions) + 1))


def refuse_unfinished_edit(store: Store, manifest: Manifest | None) -> None:
    """Raises ConfigError where an edit was begun and not finished: some of its new files are in the dataset already."""
    record = unfinished_edit(store, manifest) if manifest else None
    if record:
        raise ConfigError(
            f"{store.root}: a {record['kind']} was begun and not finished ({_short(record)}); run its command again first"
        )


def sweep_unless_unfinished(store: Store, manifest: Manifest) -> None:
    """Remove what an edit left that was killed after its manifest, unless another edit was begun since."""
    if not unfinished_edit(store, manifest):
        sweep(store, manifest)


def output_as_begun(output: OutputConfig, manifest: Manifest) -> OutputConfig:
    """`output` with the file sizes and the partition that the output was begun with: an edit must not cut it otherwise."""
    cut = {key.partition(".")[2]: value for key, value in manifest.base.items() if key.startswith("output.")}
    return OutputConfig(output.path, storage=output.storage, **cut)


def _other_settings(record: dict[str, Any], asked: dict[str, Any]) -> str:
    old, new = record.get("settings", {}), asked.get("settings", {})
    return "".join(
        f"; {key}: was {json.dumps(old.get(key))[:80]}" for key in sorted(old) if new and old[key] != new.get(key)
    )


def _short(record: dict[str, Any]) -> str:
    text = ", ".join(f"{key}={value}" for key, value in record.items() if key not in ("kind", "settings"))
    return text if len(text) <= 200 else text[:199] + "…"
