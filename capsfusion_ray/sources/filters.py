"""Find the rows that a FilterConfig leaves out, and count them by reason. Knows tables, and no files."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from capsfusion_ray.config import FilterConfig
from capsfusion_ray.core.columns import INVALID, RAW
from capsfusion_ray.core.types import FilterReason
from capsfusion_ray.sources.presets import FILTER_COLUMNS
from capsfusion_ray.sources.schema import numbers


def filter_mask(table: pa.Table, filter: FilterConfig) -> tuple[pa.ChunkedArray, dict[FilterReason, int]]:
    """A mask that is true for the rows to keep, and the number of rows that each reason leaves out.

    A row is left out if punsafe or pwatermark is at least its maximum, if similarity is below its minimum, or if the stripped raw
    caption has fewer words (separated by white space) or characters than the minimum. It counts once, for its first reason. A
    row with a null or NaN value is kept, and a row with a null caption or a parse error, too: these are rejected later by name.
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
            words = pc.if_else(pc.equal(stripped, ""), 0, words)  # splitting "" returns one empty word
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
