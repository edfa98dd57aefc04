"""Which rows a FilterConfig leaves out, counted by reason. Knows tables, no files."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from capsfusion_ray.config import FilterConfig
from capsfusion_ray.core.columns import INVALID, RAW
from capsfusion_ray.core.types import FilterReason
from capsfusion_ray.sources.presets import FILTER_COLUMNS
from capsfusion_ray.sources.schema import numbers


def filter_mask(table: pa.Table, filter: FilterConfig) -> tuple[pa.ChunkedArray, dict[FilterReason, int]]:
    """True for the rows to keep, and how many each reason left out; a row counts once, at its first reason.

    A row is left out at punsafe or pwatermark >= its maximum, at similarity < its minimum, and when the stripped raw caption
    has fewer words (runs between white space) or characters than asked. A null or NaN says nothing: the row is kept, and a
    null caption becomes a reject, which names it. Rows that are already known to be broken are kept for the same reason.
    """
    failed: list[tuple[FilterReason, pa.ChunkedArray]] = []
    if filter.max_punsafe is not None:
        column = numbers(table, FILTER_COLUMNS[FilterReason.PUNSAFE])
        failed.append((FilterReason.PUNSAFE, pc.greater_equal(column, filter.max_punsafe)))
    if filter.max_pwatermark is not None:
        column = numbers(table, FILTER_COLUMNS[FilterReason.PWATERMARK])
        failed.append((FilterReason.PWATERMARK, pc.greater_equal(column, filter.max_pwatermark)))
    if filter.min_similarity is not None:
        column = numbers(table, FILTER_COLUMNS[FilterReason.SIMILARITY])
        failed.append((FilterReason.SIMILARITY, pc.less(column, filter.min_similarity)))
    if filter.min_words is not None or filter.min_characters is not None:
        stripped = pc.utf8_trim_whitespace(table[RAW])
        if filter.min_words is not None:
            words = pc.list_value_length(pc.utf8_split_whitespace(stripped))
            words = pc.if_else(pc.equal(stripped, ""), 0, words)  # splitting "" gives one empty word
            failed.append((FilterReason.FEW_WORDS, pc.less(words, filter.min_words)))
        if filter.min_characters is not None:
            failed.append((FilterReason.FEW_CHARACTERS, pc.less(pc.utf8_length(stripped), filter.min_characters)))
    usable = pc.is_null(table[INVALID])
    left_out = pa.chunked_array([pa.repeat(False, table.num_rows)])
    counts: dict[FilterReason, int] = {}
    for reason, fails in failed:
        new = pc.and_not(pc.and_(pc.fill_null(fails, False), usable), left_out)
        left_out = pc.or_(left_out, new)
        if count := pc.sum(new).as_py():
            counts[reason] = count
    return pc.invert(left_out), counts
