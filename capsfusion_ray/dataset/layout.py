"""The name of every file and folder of an output, and nothing else. All other modules take the names from here."""

from __future__ import annotations

import re

# ---------------------------------------------------------------------------------------------- what users read
MANIFEST = "manifest.json"  # written last: an output that has one is finished
DATA_DIR = "data"  # the dataset: fused and kept rows
REJECTED_DIR = "rejected"  # the rejected rows, with their reasons
DATA_FOLDERS: tuple[str, ...] = (DATA_DIR, REJECTED_DIR)
PROGRESS = "progress.json"
REPORT = "report.html"
COMPARISON = "comparison.html"

# ---------------------------------------------------------------------------------------------- what runs keep
UNITS_DIR = "_units"  # one part per committed unit, until its group is compacted
RETRY_DIR = "_retry"  # the parts of retries and repairs, apart from those of the run
RUN_DIR = "_run"
LEASE = f"{RUN_DIR}/lease.json"
GROUPS_DIR = f"{RUN_DIR}/groups"  # one entry per compacted group and edition
ATTEMPTS_DIR = f"{RUN_DIR}/attempts"  # one note per unit that an actor works on
STARTS_DIR = f"{RUN_DIR}/starts"  # one note per actor whose engine starts
ENGINE_IS_UP = f"{STARTS_DIR}/up.json"  # written when the first engine of a run has started


def plan_path(number: int) -> str:
    """The plan with this number; the first plan of an output is number 1."""
    return f"{RUN_DIR}/plan-r{number:03d}.parquet"


PLAN_PREFIX = f"{RUN_DIR}/plan-"


def config_path(number: int) -> str:
    """The settings under which the plan with this number was made, secrets masked."""
    return f"{RUN_DIR}/config-r{number:03d}.yaml"


def record_path(edition: int) -> str:
    """The record of the edit (retry, repair or takedown) that writes this edition."""
    return f"{RUN_DIR}/revision-e{edition:03d}.json"


def group_path(group: str, plan: int, edition: int = 0) -> str:
    """The entry of one group of one plan; edition 0 is what compaction wrote."""
    name = f"r{plan:03d}-{group}"
    return f"{GROUPS_DIR}/{name}-e{edition:03d}.json" if edition else f"{GROUPS_DIR}/{name}.json"


def attempt_path(unit_id: str) -> str:
    """The note of an actor's attempt at a unit."""
    return f"{ATTEMPTS_DIR}/{unit_id}.json"


def start_path(actor: str) -> str:
    """The note of an actor whose engine starts."""
    return f"{STARTS_DIR}/{actor}.json"


def part_path(unit_id: str) -> str:
    """The part of a unit: its unit file."""
    return f"{UNITS_DIR}/{unit_id}.parquet"


def retry_parts_dir(edition: int) -> str:
    """The folder that holds `UNITS_DIR` and `PROGRESS` of the edit that writes this edition."""
    return f"{RETRY_DIR}/e{edition:03d}"


def data_file_prefix(kind: str, partition: str, stamp: str, group: str) -> str:
    """What the names of one group's data files in one partition begin with, e.g. `data/shard=g00000/part-r001`.

    `kind`: one of DATA_FOLDERS. `partition`: `column=value`. `stamp`: of_plan() or of_edition(). The group is part of
    the name unless the partition is the group, so that files of several groups in one partition have different names.
    """
    suffix = "" if partition == f"shard={group}" else f"-{group}"
    return f"{kind}/{partition}/part-{stamp}{suffix}"


def data_file_path(prefix: str, number: int) -> str:
    """The `number`-th data file with this prefix; the first is 0."""
    return f"{prefix}-{number:05d}.parquet"


def of_plan(plan: int) -> str:
    """The stamp of data files that the compaction of a plan's group writes."""
    return f"r{plan:03d}"


def of_edition(edition: int, plan: int) -> str:
    """The stamp of data files of an edition. It holds the plan: two plans have groups of the same name in one folder."""
    return f"e{edition:03d}-r{plan:03d}"


# Matches every data file that a run or an edit writes. `kind`: r for a plan's stamp, e for an edition's; `number`: of it.
DATA_FILE = re.compile(
    r"(?:data|rejected)/(?:shard=(?P<shard>g\d+)|[^/]+)/part-(?P<kind>[re])(?P<number>\d{3})(?:-r\d{3})?(?:-(?P<group>g\d+))?-\d{5}\.parquet"
)
