"""Find captions that a run wrote for many different pairs: counted per group at its compaction, judged over the whole run.

A model that fails may write "The product is shown in the image." for thousands of pairs, and each of these captions alone
passes every gate. Captions are kept as 64 bits of a hash. Pure: knows no store and no Ray.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capsfusion_ray.core.columns import DETAIL, FLAGS, FUSED, OUTCOME, RAW, REASON, SYNTHETIC
from capsfusion_ray.core.types import Outcome, Reason

RECORDED = 1000  # how many captions a group's entry keeps, the most repeated ones; smaller groups keep all
MIN_PAIRS = 20  # a caption of fewer pairs never counts as repeated
REPEATED = str(Reason.REPEATED_CAPTION)


@dataclass(frozen=True)
class Repeated:
    """The captions that a run repeats too often. `pairs`: caption_key -> pairs; `reject`: reject their rows, otherwise flag them."""

    pairs: dict[str, int]
    reject: bool

    def detail(self, caption: str) -> str:
        """The `detail` of a row that is rejected for this caption."""
        return f"{self.pairs[caption_key(caption)]} pairs got this caption"


class Tally:
    """Counts how many different pairs of one group got each caption."""

    def __init__(self) -> None:
        self._hashes: list[np.ndarray] = []  # (rows, 2) uint64: hash of the caption, hash of its pair

    def add(self, rows: pa.Table) -> None:
        """Count rows of data/, but not the kept ones: no engine wrote their caption."""
        rows = rows.filter(_written(rows))
        captions = b"".join(map(_digest, rows[FUSED].to_pylist()))
        pairs = zip(rows[RAW].to_pylist(), rows[SYNTHETIC].to_pylist(), strict=True)
        both = b"".join(_digest(f"{raw}\0{synthetic}") for raw, synthetic in pairs)
        self._hashes.append(
            np.stack([np.frombuffer(captions, ">u8"), np.frombuffer(both, ">u8")], axis=1).astype(np.uint64)
        )

    def most_repeated(self, most: int | None = RECORDED) -> dict[str, int]:
        """caption_key -> pairs, of the `most` most repeated captions (None: of all); among equals, of those with the lowest hash."""
        if not self._hashes:
            return {}
        distinct = np.unique(np.concatenate(self._hashes), axis=0)
        captions, pairs = np.unique(distinct[:, 0], return_counts=True)
        first = np.lexsort((captions, -pairs))[:most]
        return {f"{captions[i]:016x}": int(pairs[i]) for i in first}


def after_retry(noted: dict[str, int], gone: Tally, come: Tally) -> dict[str, int]:
    """A group's counts after a retry. `noted`: before it; `gone`: rows that were rejected for their caption and are fused
    again; `come`: rows that the retry wrote.
    """
    counts = Counter(noted)
    counts.subtract(gone.most_repeated(None))
    counts.update(come.most_repeated(None))
    left = sorted((-pairs, caption) for caption, pairs in counts.items() if pairs > 0)
    return {caption: -pairs for pairs, caption in left[:RECORDED]}


def repeated(groups: Iterable[dict[str, int]], fused: int, threshold: float) -> dict[str, int]:
    """caption_key -> pairs, of captions with at least MIN_PAIRS pairs and a share of `threshold` of the run's `fused` rows."""
    totals: Counter[str] = Counter()
    for group in groups:
        totals.update(group)
    least = max(MIN_PAIRS, threshold * fused)
    return {caption: pairs for caption, pairs in totals.items() if pairs >= least}


def holds(rows: pa.Table, captions: Repeated) -> pa.Array:
    """Which rows of a data file have one of these captions; rows of rejected/ never do."""
    if REASON in rows.column_names:
        return pa.array([False] * rows.num_rows)
    written = _written(rows).to_pylist()
    return pa.array(
        [w and caption_key(text) in captions.pairs for w, text in zip(written, rows[FUSED].to_pylist(), strict=True)]
    )


def mark_part(part: pa.Table, captions: Repeated) -> tuple[pa.Table, pa.Array]:
    """The part with its fused rows of these captions flagged or rejected, and which rows these are."""
    columns = {name: part[name].to_pylist() for name in (FUSED, OUTCOME, REASON, DETAIL, FLAGS)}
    hits = [
        o == Outcome.FUSED and caption_key(text) in captions.pairs
        for o, text in zip(columns[OUTCOME], columns[FUSED], strict=True)
    ]
    for i in (i for i, hit in enumerate(hits) if hit):
        if captions.reject:
            columns[OUTCOME][i], columns[REASON][i] = str(Outcome.REJECTED), REPEATED
            columns[DETAIL][i] = captions.detail(columns[FUSED][i])
        else:
            columns[FLAGS][i] = [*(columns[FLAGS][i] or ()), REPEATED]
    for name in (OUTCOME, REASON, DETAIL, FLAGS):
        at = part.schema.get_field_index(name)
        part = part.set_column(at, part.schema.field(at), pa.array(columns[name], part.schema.field(at).type))
    return part, pa.array(hits, pa.bool_())


def _written(rows: pa.Table) -> pa.Array:
    """Which rows have a caption that an engine wrote. The first flag of a kept row is "kept"."""
    kept = [bool(flags) and flags[0] == Outcome.KEPT for flags in rows[FLAGS].to_pylist()]
    return pc.invert(pa.array(kept, pa.bool_()))


def caption_key(text: str) -> str:
    """The hash under which a caption is counted, as hexadecimal text."""
    return _digest(text).hex()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
