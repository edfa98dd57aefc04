"""Check a finished output: each planned row is exactly one fused, kept, rejected, filtered, removed or unreadable row.

Reads the plans, the manifest and the data files, and repairs nothing. Knows the store; no Ray, no engine.
"""

from __future__ import annotations

import io
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from capsfusion_ray.config import VerifyConfig
from capsfusion_ray.core.accounting import Counts
from capsfusion_ray.core.columns import ROW_ID
from capsfusion_ray.core.parquet import open_parquet, read_footer, read_schema
from capsfusion_ray.core.plan import Plan
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.dataset.compaction import check_group
from capsfusion_ray.dataset.damage import WAY_OUT, checksum_problem, read_if_there
from capsfusion_ray.dataset.layout import DATA_FOLDERS, MANIFEST
from capsfusion_ray.dataset.manifest import FileEntry, GroupEntry, Manifest, read_manifest
from capsfusion_ray.dataset.plan_files import read_plans
from capsfusion_ray.errors import AccountingError, CapsFusionError, ConfigError
from capsfusion_ray.storage import Store

_READERS = 8
_MAX_PROBLEMS = 50  # shown one by one: with a broken disk every file would be one


def verify(cfg: VerifyConfig) -> dict[str, Any]:
    """Check `cfg.output`; `cfg.deep` also reads every row. Returns verified, deep, rows, files, bytes, units and output.

    Raises AccountingError, which lists the problems found, and ConfigError for an output that is not finished.
    """
    store = Store(cfg.output.path, cfg.output.storage)
    manifest = read_manifest(store)
    if manifest is None:
        plans = read_plans(store)
        state = "a run that is not finished; run the fuse command again" if plans else "no output of this program"
        raise ConfigError(f"output.path={cfg.output.path}: it has no {MANIFEST}, so it is {state}")
    problems = list(_all_problems(store, read_plans(store), manifest, cfg.deep))
    if problems:
        shown = "\n  ".join(problems[:_MAX_PROBLEMS])
        raise AccountingError(f"{cfg.output.path}: {len(problems)} problems\n  {shown}")
    return {
        "verified": True,
        "deep": cfg.deep,
        "rows": manifest.counts.rows,
        "files": len(manifest.files),
        "bytes": sum(file.bytes for file in manifest.files),
        "units": len(manifest.units),
        "output": cfg.output.path,
    }


def _all_problems(store: Store, plans: list[Plan], manifest: Manifest, deep: bool) -> Iterator[str]:
    yield from _plan_problems(plans, manifest)
    yield from _count_problems(manifest)
    yield from _listing_problems(store, manifest)
    seen = _Seen(plans, manifest.files) if deep else None
    with ThreadPoolExecutor(_READERS) as pool:
        for found in pool.map(lambda file: _file_problems(store, file, seen), manifest.files):
            yield from found
    if deep:
        yield from _schema_problems(store, manifest)


def _plan_problems(plans: list[Plan], manifest: Manifest) -> Iterator[str]:
    planned = {unit.id: unit for plan in plans for unit in plan.units}
    held = Counter(unit.id for unit in manifest.units)
    yield from (
        f"unit {unit_id} of {planned[unit_id].path} is planned and not in the manifest"
        for unit_id in planned.keys() - held.keys()
    )
    yield from (f"unit {unit_id} is in the manifest and not planned" for unit_id in held.keys() - planned.keys())
    yield from (f"unit {unit_id} is {times} times in the manifest" for unit_id, times in held.items() if times > 1)
    for plan in plans:
        if plan.fingerprint != manifest.fingerprint:
            yield f"plan {plan.number} has fingerprint {plan.fingerprint}, the manifest {manifest.fingerprint}"
    yield from _overlaps(list(planned.values()))


def _overlaps(units: list[WorkUnit]) -> Iterator[str]:
    ordered = sorted(units, key=lambda unit: (unit.path, unit.start))
    for a, b in zip(ordered, ordered[1:], strict=False):
        if a.path == b.path and b.start < a.stop:
            yield f"rows {b.start}-{min(a.stop, b.stop)} of {a.path} are planned twice (units {a.id}, {b.id})"


def _count_problems(manifest: Manifest) -> Iterator[str]:
    for unit in manifest.units:
        try:
            unit.check()
        except AccountingError as error:
            yield str(error)
    counts = Counts.of(manifest.units, sum(unit.planned for unit in manifest.units))
    if counts != manifest.counts:
        yield f"the manifest's totals {manifest.counts} are not the sum of its units {counts}"
    if counts.planned != counts.done:
        yield f"{counts.planned} rows planned, {counts.done} counted"
    try:
        check_group(GroupEntry("(all)", 0, manifest.units, manifest.files))
    except CapsFusionError as error:
        yield str(error)


def _listing_problems(store: Store, manifest: Manifest) -> Iterator[str]:
    listed = {file.path: file.size for folder in DATA_FOLDERS for file in store.list(folder)}
    for file in manifest.files:
        size = listed.pop(file.path, None)
        if size is None:
            yield f"{file.path}: missing; {WAY_OUT}"
        elif size != file.bytes:
            yield f"{file.path}: {size} bytes, the manifest says {file.bytes}"
    yield from (f"{path}: not in the manifest, but readers of the folder read it" for path in listed)


class _Seen:
    """Which rows of each unit were read so far. A unit may be in many data files; it is forgotten after the last of them."""

    def __init__(self, plans: Sequence[Plan], files: Sequence[FileEntry]) -> None:
        self.units = {unit.id: unit for plan in plans for unit in plan.units}
        self._files_left = Counter(unit_id for file in files for unit_id, _ in file.units)
        self._rows: dict[str, np.ndarray[Any, np.dtype[np.bool_]]] = {}
        self._lock = threading.Lock()

    def again(self, unit: WorkUnit, numbers: Sequence[int]) -> list[int]:
        """Note the row numbers of a unit in one file; returns those that another file has, too."""
        at = np.array(numbers, dtype=np.int64) - unit.start
        with self._lock:
            rows = self._rows.pop(unit.id) if unit.id in self._rows else np.zeros(unit.rows, dtype=bool)
            twice: list[int] = (at[rows[at]] + unit.start).tolist()
            rows[at] = True
            self._files_left[unit.id] -= 1
            if self._files_left[unit.id]:
                self._rows[unit.id] = rows
        return twice


def _file_problems(store: Store, file: FileEntry, seen: _Seen | None) -> list[str]:
    data = read_if_there(store, file)
    if data is None:
        return []  # _listing_problems reports it
    if wrong := checksum_problem(file, data):
        return [f"{file.path}: {wrong}; {WAY_OUT}"]
    rows = read_footer(io.BytesIO(data)).metadata.num_rows
    if rows != file.rows or rows != sum(n for _, n in file.units):
        return [f"{file.path}: {rows} rows, the manifest says {file.rows}"]
    return list(_row_problems(file, data, seen)) if seen else []


def _row_problems(file: FileEntry, data: bytes, seen: _Seen) -> Iterator[str]:
    """Each row must be in its unit's row range, in ascending order, and in no other file.

    Together with the units' counts this proves that each row is in the dataset once.
    """
    ids = open_parquet(io.BytesIO(data), where=file.path).read(columns=[ROW_ID])[ROW_ID].to_pylist()
    at = 0
    for unit_id, rows in file.units:
        unit = seen.units.get(unit_id)
        numbers = [-1]
        for row_id in ids[at : at + rows] if unit else ():
            path, number = re.fullmatch(r"(.*):(\d+)", row_id, re.DOTALL).groups()  # type: ignore[union-attr]
            if not (unit and path == unit.path and unit.start <= int(number) < unit.stop and int(number) > numbers[-1]):
                yield f"{file.path}: row {row_id} is not in its place in unit {unit_id} ({unit})"
                break
            numbers.append(int(number))
        if unit:
            yield from (
                f"{file.path}: row {unit.path}:{number} is in another file, too"
                for number in seen.again(unit, numbers[1:])
            )
        at += rows


def _schema_problems(store: Store, manifest: Manifest) -> Iterator[str]:
    first: dict[str, tuple[str, Any]] = {}
    for file in manifest.files:
        with store.open_input(file.path) as source:
            schema = read_schema(source, store.url(file.path)).remove_metadata()
        path, known = first.setdefault(file.kind, (file.path, schema))
        if schema != known:
            yield f"{file.path}: its columns differ from those of {path}"
