"""Take rows out of a finished output, and leave no text of them in it: jobs/takedown.py. Knows the store; no Ray.

Only files that hold such a row are written anew. The accounting keeps the rows, as `removed`. What was copied out of the
output before, by an export or a comparison page of another output, is not known here.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from capsfusion_ray.config import FilterConfig, OutputConfig
from capsfusion_ray.core.columns import INVALID, ROW_ID, URL
from capsfusion_ray.dataset.layout import COMPARISON, REPORT, part_path
from capsfusion_ray.dataset.lease import Lease
from capsfusion_ray.dataset.manifest import read_finished, read_groups
from capsfusion_ray.dataset.plan_files import read_plans
from capsfusion_ray.dataset.rewriter import Rewriter, as_begun, begin, clean, publish, sweep_if_idle
from capsfusion_ray.dataset.unit_files import committed
from capsfusion_ray.errors import ConfigError, SourceError
from capsfusion_ray.sources.filters import filter_mask
from capsfusion_ray.sources.presets import FILTER_COLUMNS
from capsfusion_ray.sources.schema import active_filters, numbers
from capsfusion_ray.storage import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TakedownConfig:
    """jobs/takedown.py: a row goes if any of these says so."""

    output: OutputConfig = field(default_factory=OutputConfig)
    urls: str = ""  # a text file, plain or .gz: one image_url a line
    row_ids: str = ""  # a text file, plain or .gz: one row_id a line
    above: dict[str, float] = field(
        default_factory=dict
    )  # passthrough column -> rows with a larger value go, e.g. {punsafe: 0.3}
    below: dict[str, float] = field(default_factory=dict)  # passthrough column -> rows with a smaller value go
    filter: FilterConfig = field(
        default_factory=FilterConfig
    )  # rows that the run would have left out under this filter go
    takeover: bool = False

    def __post_init__(self) -> None:
        if not (self.urls or self.row_ids or self.above or self.below or self.filter != FilterConfig()):
            raise ConfigError(
                "nothing to take down: give urls=<file>, row_ids=<file>, filter.<key>=…, above={column: value} or below={column: value}"
            )


def takedown(cfg: TakedownConfig) -> dict[str, Any]:
    """Remove the rows, publish the new manifest, remove the old files. The same command again resumes."""
    began = time.monotonic()
    if not cfg.output.path:
        raise ConfigError("output.path: missing; give output.path=<a finished output>")
    store = Store(cfg.output.path, cfg.output.storage)
    with Lease(store, cfg.takeover) as lease:
        manifest, etag = read_finished(store, "a takedown")
        plans = read_plans(store)
        output = as_begun(cfg.output, manifest)
        criteria, is_removed, found = _criteria(cfg, dict(plans[0].fields))
        sweep_if_idle(store, manifest)
        edition = begin(store, manifest, {"kind": "takedown", **criteria}, manifest.files)
        rewriter = Rewriter(store, edition, plans[0].fields, output)
        before = read_groups(store)
        resumed = any(entry.edition == edition for entry in before)  # what was found in those is not known any more
        entries = rewriter.each(before, lambda entry: rewriter.remove(entry, is_removed), lease.check)
        changed = sum(entry.edition == edition for entry in entries)
        lease.check()
        record = {"revision": edition, "kind": "takedown", "groups": changed, **criteria}
        after = publish(store, manifest, etag, record)
        swept = clean(store, after)
        _forget(store)
    removed = after.counts.removed - manifest.counts.removed
    not_found = {key: criteria[key]["count"] - len(values) for key, values in found.items()}
    for key, n in not_found.items():
        if n and not resumed:
            log.warning(
                "%s=%s: %d of its %d lines are no %s of this output (any more)",
                key,
                getattr(cfg, key),
                n,
                criteria[key]["count"],
                key[:-1],
            )
    log.info("%d rows removed, %d groups rewritten, %d old files deleted", removed, changed, swept)
    return {
        "removed": removed,
        "not_found": None if resumed else sum(not_found.values()),
        "groups_rewritten": changed,
        "files_deleted": swept,
        "seconds": round(time.monotonic() - began, 2),
        "output": cfg.output.path,
    }


def _forget(store: Store) -> None:
    """Remove whatever else may hold the text of a removed row. The lease is held, and every unit stands in the manifest."""
    store.delete(
        [part_path(unit_id) for unit_id in committed(store)]
    )  # of attempts that came after their group was compacted
    store.delete_leftovers(older_than_s=0)  # torn files of killed writers; who still writes here has lost the lease
    store.delete([REPORT, COMPARISON])  # they show samples of rows


def _criteria(
    cfg: TakedownConfig, fields: dict[str, str]
) -> tuple[dict[str, Any], Callable[[pa.Table], pa.Array], dict[str, set[str]]]:
    """What is noted of the criteria (hashes, no URLs: what is removed leaves no trace), the test of a table's rows, and the
    listed values that it met so far.
    """
    urls, row_ids = _lines(cfg.urls, "urls"), _lines(cfg.row_ids, "row_ids")
    for name in (*cfg.above, *cfg.below):
        if name not in fields:
            raise ConfigError(f"above/below: {name} is no column of this output; it has {sorted(fields)}")
    for reason in active_filters(cfg.filter):
        if FILTER_COLUMNS[reason] not in fields:
            raise ConfigError(
                f"filter: the {reason} filter needs a column {FILTER_COLUMNS[reason]!r}, and this output has {sorted(fields)}"
            )
    filters = {name: value for name, value in vars(cfg.filter).items() if value is not None}
    noted: dict[str, Any] = {"above": dict(cfg.above), "below": dict(cfg.below), "filter": filters}
    listed = {
        key: (column, values) for key, column, values in (("urls", URL, urls), ("row_ids", ROW_ID, row_ids)) if values
    }
    for key, (_, values) in listed.items():
        noted[key] = {"count": len(values), "sha256": hashlib.sha256("\n".join(sorted(values)).encode()).hexdigest()}
    found: dict[str, set[str]] = {key: set() for key in listed}

    def is_removed(rows: pa.Table) -> pa.Array:
        tests = []
        for key, (column, values) in listed.items():
            written = pc.utf8_trim_whitespace(rows[column])  # as the list's lines are
            tests.append(pc.is_in(written, pa.array(values, pa.string())))
            found[key].update(written.filter(tests[-1]).to_pylist())
        tests += [pc.fill_null(pc.greater(numbers(rows, name), value), False) for name, value in cfg.above.items()]
        tests += [pc.fill_null(pc.less(numbers(rows, name), value), False) for name, value in cfg.below.items()]
        if filters:
            as_read = rows.append_column(INVALID, pa.nulls(rows.num_rows, pa.string()))
            tests.append(pc.invert(filter_mask(as_read, cfg.filter)[0]))
        together = tests[0]
        for test in tests[1:]:
            together = pc.or_(together, test)
        return together

    return noted, is_removed, found


def _lines(path: str, key: str) -> list[str]:
    if not path:
        return []
    try:
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if path.endswith(".gz") else data).decode(
            "utf-8-sig"
        )  # as spreadsheets save it, too
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise SourceError(f"{key}={path}: cannot be read as lines of text ({error})") from None
    values = sorted({line.strip() for line in text.split("\n") if line.strip()})
    if not values:
        raise SourceError(f"{key}={path}: no line in it")
    return values
