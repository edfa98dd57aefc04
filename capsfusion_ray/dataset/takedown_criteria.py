"""Which rows a takedown removes: listed URLs and row ids, columns above or below a value, and a filter. Knows no store."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from capsfusion_ray.config import FilterConfig, OutputConfig, section, setting
from capsfusion_ray.core.columns import INVALID, ROW_ID, URL
from capsfusion_ray.errors import ConfigError, SourceError
from capsfusion_ray.sources.filters import filter_mask
from capsfusion_ray.sources.presets import FILTER_COLUMNS
from capsfusion_ray.sources.schema import active_filters, numbers

_LISTS = {"urls": URL, "row_ids": ROW_ID}  # setting -> the column that its lines are compared with


@dataclass(frozen=True)
class TakedownConfig:
    """The settings of a takedown: a row is removed if any of these says so."""

    output: OutputConfig = section(OutputConfig, required=["path"])
    urls: str = setting("", "a text file, plain or .gz, with one image_url per line", common=True)
    row_ids: str = setting("", "a text file, plain or .gz, with one row_id per line", common=True)
    above: dict[str, float] = setting(
        {}, "passthrough column -> remove rows with a larger value, e.g. {punsafe: 0.3}", common=True
    )
    below: dict[str, float] = setting({}, "passthrough column -> remove rows with a smaller value", common=True)
    filter: FilterConfig = section(FilterConfig, "remove the rows that the run would have left out under this filter")
    takeover: bool = setting(False, "stop another driver that writes to the same output, and continue in its place")

    def __post_init__(self) -> None:
        if not (self.urls or self.row_ids or self.above or self.below or self.filter != FilterConfig()):
            raise ConfigError(
                "nothing to take down: give urls=<file>, row_ids=<file>, filter.<key>=…, above={column: value} or below={column: value}"
            )


class Criteria:
    """The criteria of one takedown, and the listed lines that it has met so far.

    `fields`: passthrough column -> type, of the output. Raises ConfigError for a column that the output does not have,
    SourceError for a list that cannot be read.
    """

    def __init__(self, cfg: TakedownConfig, fields: dict[str, str]) -> None:
        _check_columns(cfg, fields)
        self._cfg = cfg
        self._filtered = any(value is not None for value in vars(cfg.filter).values())
        lines = {key: _read_lines(getattr(cfg, key), key) for key in _LISTS if getattr(cfg, key)}
        self._lists = {key: pa.array(values, pa.string()) for key, values in lines.items()}
        self._met: dict[str, set[str]] = {key: set() for key in lines}
        self.record = _record(cfg, lines)

    def is_removed(self, rows: pa.Table) -> pa.Array:
        """Which of the rows of a data file are removed; notes the listed lines that they match."""
        tests = []
        for key, values in self._lists.items():
            stored = pc.utf8_trim_whitespace(rows[_LISTS[key]])  # the list's lines are trimmed, too
            tests.append(pc.is_in(stored, values))
            self._met[key].update(stored.filter(tests[-1]).to_pylist())
        for name, value in self._cfg.above.items():
            tests.append(pc.fill_null(pc.greater(numbers(rows, name), value), False))
        for name, value in self._cfg.below.items():
            tests.append(pc.fill_null(pc.less(numbers(rows, name), value), False))
        if self._filtered:
            as_read = rows.append_column(INVALID, pa.nulls(rows.num_rows, pa.string()))
            tests.append(pc.invert(filter_mask(as_read, self._cfg.filter)[0]))
        return reduce(pc.or_, tests)

    @property
    def not_found(self) -> dict[str, tuple[int, int]]:
        """Setting -> (lines that no row matched so far, all lines), of each list that was given."""
        return {key: (len(values) - len(self._met[key]), len(values)) for key, values in self._lists.items()}


def _check_columns(cfg: TakedownConfig, fields: dict[str, str]) -> None:
    for key, wanted in (("above", cfg.above), ("below", cfg.below)):
        for name in wanted:
            if name not in fields:
                raise ConfigError(f"{key}: {name} is no column of this output; its columns are {sorted(fields)}")
    for reason in active_filters(cfg.filter):
        if FILTER_COLUMNS[reason] not in fields:
            raise ConfigError(
                f"filter: the {reason} filter needs a column {FILTER_COLUMNS[reason]!r}, and this output has {sorted(fields)}; "
                "take down by urls, row_ids or one of these columns"
            )


def _record(cfg: TakedownConfig, lines: dict[str, list[str]]) -> dict[str, Any]:
    """What the output keeps of the criteria: counts and hashes of the lists, because removed URLs must leave no trace."""
    filters = {name: value for name, value in vars(cfg.filter).items() if value is not None}
    record: dict[str, Any] = {"above": dict(cfg.above), "below": dict(cfg.below), "filter": filters}
    for key, values in lines.items():
        record[key] = {"count": len(values), "sha256": hashlib.sha256("\n".join(values).encode()).hexdigest()}
    return record


def _read_lines(path: str, key: str) -> list[str]:
    """The different lines of a text file, sorted, without white space around them and without empty lines."""
    try:
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if path.endswith(".gz") else data
        text = data.decode("utf-8-sig")  # spreadsheets write a byte order mark
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise SourceError(f"{key}={path}: cannot be read as lines of text ({error}); give a UTF-8 text file") from None
    values = sorted({line.strip() for line in text.split("\n") if line.strip()})
    if not values:
        raise SourceError(f"{key}={path}: the file has no line; give one value per line")
    return values
