"""What the finished dataset is made of: `manifest.json`, and the group entries that it is assembled from.

While a run goes on, each compacted group of input shards leaves one entry under `_run/groups/`; the manifest, written
last, joins them. Knows the store; no Ray, no parquet.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from capsfusion_ray.core.accounting import Counts, UnitSummary
from capsfusion_ray.core.plan import Plan
from capsfusion_ray.dataset.layout import GROUPS_DIR, MANIFEST, group_path
from capsfusion_ray.errors import AccountingError, ConfigError
from capsfusion_ray.storage import Store

MANIFEST_VERSION = 1
_GROUP_NAME = len("r001-g00000")
WAY_OUT = "the fuse command with repair=true recomputes its units"


@dataclass(frozen=True)
class FileEntry:
    """One file of the dataset. `units`: (unit id, rows of it in this file), in row order."""

    path: str
    kind: str  # "data" or "rejected"
    rows: int
    bytes: int
    sha256: str
    units: tuple[tuple[str, int], ...]

    @classmethod
    def parse(cls, data: dict[str, Any]) -> FileEntry:
        return cls(**{**data, "units": tuple((unit, rows) for unit, rows in data["units"])})


def checksum_problem(file: FileEntry, data: bytes) -> str:
    """What tells a file's bytes from those that were noted; empty where nothing does."""
    digest = hashlib.sha256(data).hexdigest()
    return "" if digest == file.sha256 else f"checksum {digest[:12]}…, the manifest says {file.sha256[:12]}…"


def read_intact(store: Store, file: FileEntry) -> bytes:
    """A file's bytes, to be written elsewhere: damage must not get a new checksum there. Raises AccountingError."""
    data = store.get(file.path)
    if wrong := checksum_problem(file, data):
        raise AccountingError(f"{store.url(file.path)}: damaged ({wrong}); {WAY_OUT}")
    return data


@dataclass(frozen=True)
class GroupEntry:
    """A compacted group of one plan: its units' summaries and the files that hold their rows.

    `edition` 0 is what compaction wrote; a retry or a takedown writes the next one, named as its revision of the dataset.
    `repeats`: hashes of its most repeated captions, and how many pairs got each (see repeats.py).
    """

    group: str
    revision: int
    units: tuple[UnitSummary, ...]
    files: tuple[FileEntry, ...]
    edition: int = 0
    repeats: dict[str, int] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return group_path(self.group, self.revision, self.edition)

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> GroupEntry:
        raw = json.loads(data)
        units = tuple(UnitSummary.parse(unit) for unit in raw["units"])
        files = tuple(FileEntry.parse(file) for file in raw["files"])
        return cls(raw["group"], raw["revision"], units, files, raw["edition"], raw["repeats"])


@dataclass(frozen=True)
class Manifest:
    """The finished dataset, whole."""

    fingerprint: str
    base: dict[str, Any]
    counts: Counts
    unreadable_shards: dict[str, str]
    units: tuple[UnitSummary, ...]
    files: tuple[FileEntry, ...]
    revisions: tuple[
        dict[str, Any], ...
    ]  # revision, kind, units, rows, seconds, and of a plan its cost: estimate and actual

    def to_bytes(self) -> bytes:
        return json.dumps({"version": MANIFEST_VERSION, **asdict(self)}, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        raw = json.loads(data)
        version = raw.pop("version")
        if version != MANIFEST_VERSION:
            raise AccountingError(f"{MANIFEST}: version {version}; this program reads version {MANIFEST_VERSION}")
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
    """Join all group entries. Raises AccountingError unless they hold every planned unit once, and no two name one file."""
    units = [unit for entry in entries for unit in entry.units]
    planned = {unit.id for plan in plans for unit in plan.units}
    counted = Counter(unit.id for unit in units)
    twice = [unit for unit, times in counted.items() if times > 1]
    missing = planned - counted.keys()
    foreign = counted.keys() - planned
    if twice or missing or foreign:
        raise AccountingError(
            f"the groups do not add up to the plan: {len(missing)} units missing {sorted(missing)[:3]}, "
            f"{len(twice)} twice {twice[:3]}, {len(foreign)} unknown {sorted(foreign)[:3]}"
        )
    files = tuple(file for entry in entries for file in entry.files)
    if shared := [path for path, times in Counter(file.path for file in files).items() if times > 1]:
        raise AccountingError(f"two groups name one file, and one of them has lost its rows: {shared[:3]}")
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
    """The manifest of a finished output, or None before the first run ended."""
    found = store.get_with_etag(MANIFEST)
    return Manifest.from_bytes(found[0]) if found else None


def read_finished(store: Store, asked: str) -> tuple[Manifest, str]:
    """The manifest and its etag. Raises ConfigError for an output that is not finished; `asked`: what needs one."""
    found = store.get_with_etag(MANIFEST)
    if found is None:
        raise ConfigError(
            f"output.path={store.root}: no manifest.json, and {asked} needs a finished output; run the fuse command to its end first"
        )
    return Manifest.from_bytes(found[0]), found[1]


def read_groups(store: Store) -> list[GroupEntry]:
    """The last edition of every group compacted so far, in order of revision and group."""
    names = [file.path.removesuffix(".json") for file in store.list(GROUPS_DIR) if file.path.endswith(".json")]
    # Without the suffix a group's name sorts before those of its later editions.
    last = {name.rpartition("/")[2][:_GROUP_NAME]: name for name in sorted(names)}
    return [GroupEntry.from_bytes(store.get(f"{name}.json")) for name in last.values()]
