"""The manifest of a finished dataset (`manifest.json`), and the group entries that it is assembled from.

Each compacted group of input shards has one entry under `_run/groups/`. The manifest joins all entries and is written last.
Knows the store; no Ray, no Parquet.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from capsfusion_ray.core.accounting import Counts, UnitSummary
from capsfusion_ray.core.plan import Plan
from capsfusion_ray.dataset.layout import GROUPS_DIR, MANIFEST, group_path
from capsfusion_ray.errors import AccountingError, ConfigError
from capsfusion_ray.storage import Store, decode_note, encode_note

MANIFEST_VERSION = 1
_GROUP_NAME = len("r001-g00000")


@dataclass(frozen=True)
class FileEntry:
    """One data file. `kind`: the folder, one of layout.DATA_FOLDERS. `units`: (unit id, its rows in this file), in row order."""

    path: str
    kind: str
    rows: int
    bytes: int
    sha256: str
    units: tuple[tuple[str, int], ...]

    @classmethod
    def parse(cls, data: dict[str, Any]) -> FileEntry:
        """From a JSON object."""
        return cls(**{**data, "units": tuple((unit, rows) for unit, rows in data["units"])})


@dataclass(frozen=True)
class GroupEntry:
    """A compacted group of one plan: its units' summaries, and the data files that hold their rows.

    `plan`: the plan's number. `edition` 0 is what compaction wrote; a retry, a repair or a takedown writes an edition with
    the number of its revision. `repeats`: hash -> pairs, of the captions that most pairs got (core/repeated_captions).
    """

    group: str
    plan: int
    units: tuple[UnitSummary, ...]
    files: tuple[FileEntry, ...]
    edition: int = 0
    repeats: dict[str, int] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return group_path(self.group, self.plan, self.edition)

    def to_bytes(self) -> bytes:
        """One JSON object. The plan's number has the key "revision", its name in version 0.1."""
        fields = {"revision" if key == "plan" else key: value for key, value in vars(self).items()}
        return encode_note(fields | _lists(self.units, self.files))

    @classmethod
    def from_bytes(cls, data: bytes) -> GroupEntry:
        """The inverse of to_bytes."""
        raw = decode_note(data)
        units = tuple(UnitSummary.parse(unit) for unit in raw["units"])
        files = tuple(FileEntry.parse(file) for file in raw["files"])
        return cls(raw["group"], raw["revision"], units, files, raw["edition"], raw["repeats"])


def _lists(units: Sequence[UnitSummary], files: Sequence[FileEntry]) -> dict[str, list[dict[str, Any]]]:
    """The fields `units` and `files` as they are in JSON."""
    return {"units": [unit.to_dict() for unit in units], "files": [vars(file) for file in files]}


@dataclass(frozen=True)
class Manifest:
    """All units, data files and counts of a finished dataset, the settings that decided them, and its revisions."""

    fingerprint: str
    base: dict[str, Any]  # as Plan.base
    counts: Counts
    unreadable_shards: dict[str, str]  # path -> error
    units: tuple[UnitSummary, ...]
    files: tuple[FileEntry, ...]
    # One per plan and per edit: revision, kind, units, rows, seconds; of a plan also the estimated and the actual cost.
    revisions: tuple[dict[str, Any], ...]

    def to_bytes(self) -> bytes:
        """One JSON object, indented, with the format's version first."""
        fields = {"version": MANIFEST_VERSION, **vars(self), "counts": asdict(self.counts)}
        return json.dumps(fields | _lists(self.units, self.files), indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """The inverse of to_bytes. Raises AccountingError for a manifest of another version of this program."""
        raw = decode_note(data)
        version = raw.pop("version")
        if version != MANIFEST_VERSION:
            raise AccountingError(
                f"{MANIFEST}: it has version {version}, and this program reads version {MANIFEST_VERSION}; use the program that wrote it"
            )
        return cls(
            raw["fingerprint"],
            raw["base"],
            Counts(**raw["counts"]),
            raw["unreadable_shards"],
            tuple(UnitSummary.parse(unit) for unit in raw["units"]),
            tuple(FileEntry.parse(file) for file in raw["files"]),
            tuple(raw["revisions"]),
        )


def assemble(plans: Sequence[Plan], entries: Sequence[GroupEntry], revisions: Sequence[dict[str, Any]]) -> Manifest:
    """Join all group entries. Raises AccountingError unless each planned unit is in one entry, and each file in one entry."""
    units = [unit for entry in entries for unit in entry.units]
    planned = {unit.id for plan in plans for unit in plan.units}
    counted = Counter(unit.id for unit in units)
    twice = [unit for unit, times in counted.items() if times > 1]
    missing = planned - counted.keys()
    foreign = counted.keys() - planned
    if twice or missing or foreign:
        raise AccountingError(
            f"the groups' entries do not hold the planned units: {len(missing)} units missing {sorted(missing)[:3]}, "
            f"{len(twice)} in two entries {twice[:3]}, {len(foreign)} of no plan {sorted(foreign)[:3]}"
        )
    files = tuple(file for entry in entries for file in entry.files)
    if shared := [path for path, times in Counter(file.path for file in files).items() if times > 1]:
        raise AccountingError(
            f"two groups have a data file of the same name, so one group's rows are lost: {shared[:3]}"
        )
    return Manifest(
        plans[0].fingerprint,
        plans[0].base,
        Counts.of(units, sum(plan.rows for plan in plans)),
        {shard.path: shard.error for plan in plans for shard in plan.shards if shard.error},
        tuple(units),
        files,
        tuple(revisions),
    )


def read_manifest(store: Store) -> Manifest | None:
    """The manifest; None where the output is not finished."""
    found = store.get_with_etag(MANIFEST)
    return Manifest.from_bytes(found[0]) if found else None


def read_finished(store: Store, needed_by: str) -> Manifest:
    """The manifest. Raises ConfigError for an output that is not finished; `needed_by`: the command, for that message."""
    manifest = read_manifest(store)
    if manifest is None:
        raise ConfigError(
            f"output.path={store.root}: it has no {MANIFEST}, and {needed_by} needs a finished output; run the fuse command to "
            "its end first"
        )
    return manifest


def swap_manifest(store: Store, before: Manifest | None, after: Manifest) -> None:
    """Replace the manifest `before` by `after`, with compare-and-swap; None: `after` is the output's first manifest.

    Raises AccountingError where the manifest is not `before` any more, because another driver replaced it.
    """
    found = store.get_with_etag(MANIFEST)
    is_before = (Manifest.from_bytes(found[0]) if found else None) == before
    if not is_before or store.put_if_match(MANIFEST, after.to_bytes(), found[1] if found else None) is None:
        raise AccountingError(
            f"{store.url(MANIFEST)}: another driver replaced it while this command ran; run the same command again"
        )


def read_groups(store: Store) -> list[GroupEntry]:
    """The newest entry of every compacted group, in order of plan and group."""
    names = [file.path.removesuffix(".json") for file in store.list(GROUPS_DIR) if file.path.endswith(".json")]
    # Without ".json" the name of a group's first entry sorts before those of its later editions.
    last = {name.rpartition("/")[2][:_GROUP_NAME]: name for name in sorted(names)}
    return [GroupEntry.from_bytes(store.get(f"{name}.json")) for name in last.values()]
