"""Which captions does a run repeat for many different pairs? Counted at each group's compaction, judged over the whole run.

A model that lost its way writes "The product is shown in the image." for thousands of pairs, and each of these captions
passes every gate by itself. Pure: knows no store and no Ray. Captions are held as 64 bits of a hash.
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

RECORDED = 1000  # of a group's captions, the most repeated; a group that has no more is counted whole
MIN_PAIRS = 20  # a caption of fewer pairs is in no run a repeated one
REPEATED = str(Reason.REPEATED_CAPTION)


@dataclass(frozen=True)
class Repeated:
    """The captions that a run repeats too often, caption's hash -> pairs, and whether their rows are rejected or flagged."""

    pairs: dict[str, int]
    reject: bool

    def detail(self, caption: str) -> str:
        return f"{self.pairs[caption_key(caption)]} pairs got this caption"


class Tally:
    """How many different pairs of one group got the same caption."""

    def __init__(self) -> None:
        self._hashes: list[np.ndarray] = []  # (rows, 2) uint64: of the caption, of its pair

    def add(self, rows: pa.Table) -> None:
        """Count rows of data/; kept ones, whose caption no engine wrote, are left out."""
        rows = rows.filter(_written(rows))
        captions = b"".join(map(_digest, rows[FUSED].to_pylist()))
        pairs = zip(rows[RAW].to_pylist(), rows[SYNTHETIC].to_pylist(), strict=True)
        both = b"".join(_digest(f"{raw}\0{synthetic}") for raw, synthetic in pairs)
        self._hashes.append(
            np.stack([np.frombuffer(captions, ">u8"), np.frombuffer(both, ">u8")], axis=1).astype(np.uint64)
        )

    def most_repeated(self, most: int | None = RECORDED) -> dict[str, int]:
        """Caption's hash -> pairs, for the `most` most repeated or all; of equals, those whose hash is lowest in all groups."""
        if not self._hashes:
            return {}
        distinct = np.unique(np.concatenate(self._hashes), axis=0)
        captions, pairs = np.unique(distinct[:, 0], return_counts=True)
        first = np.lexsort((captions, -pairs))[:most]
        return {f"{captions[i]:016x}": int(pairs[i]) for i in first}


def after_retry(noted: dict[str, int], gone: Tally, come: Tally) -> dict[str, int]:
    """What a group notes after a retry: `gone` were rejected for their caption and are fused again, `come` was written now."""
    counts = Counter(noted)
    counts.subtract(gone.most_repeated(None))
    counts.update(come.most_repeated(None))
    left = sorted((-pairs, caption) for caption, pairs in counts.items() if pairs > 0)
    return {caption: -pairs for pairs, caption in left[:RECORDED]}


def repeated(groups: Iterable[dict[str, int]], fused: int, threshold: float) -> dict[str, int]:
    """Caption's hash -> pairs, of those that `threshold` of the run's `fused` rows got, and MIN_PAIRS at least."""
    totals: Counter[str] = Counter()
    for group in groups:
        totals.update(group)
    least = max(MIN_PAIRS, threshold * fused)
    return {caption: pairs for caption, pairs in totals.items() if pairs >= least}


def holds(rows: pa.Table, captions: Repeated) -> pa.Array:
    """Which rows of a file have one of these captions; none of a rejected file's."""
    if REASON in rows.column_names:
        return pa.array([False] * rows.num_rows)
    written = _written(rows).to_pylist()
    return pa.array(
        [w and caption_key(text) in captions.pairs for w, text in zip(written, rows[FUSED].to_pylist(), strict=True)]
    )


def mark_part(part: pa.Table, captions: Repeated) -> tuple[pa.Table, pa.Array]:
    """A part whose fused rows with one of these captions are flagged or rejected, and which rows these are."""
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
    """Which rows' captions an engine wrote: the first flag of a kept row says that it is one."""
    kept = [bool(flags) and flags[0] == Outcome.KEPT for flags in rows[FLAGS].to_pylist()]
    return pc.invert(pa.array(kept, pa.bool_()))


def caption_key(text: str) -> str:
    """What stands for a caption in the counts."""
    return _digest(text).hex()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
