"""What a gate gets and what it returns: a Triple of captions, split into words once, and a Fault. Knows no gate and no verdict."""

from __future__ import annotations

import re
from typing import NamedTuple

from capsfusion_ray.core.types import FinishReason
from capsfusion_ray.core.word_keys import source_words

MAX_DETAIL = 200  # characters
MAX_READ = 20_000  # characters of a caption that are judged; no prompt is longer, and alt texts of 1 MB exist
SURROGATE = re.compile("[\ud800-\udfff]")


class Fault(NamedTuple):
    """One fault of a caption."""

    size: float  # grows with the fault; what it measures is in the docstring of the gate
    detail: str  # the words at fault, for the reader


class Triple:
    """A fused caption and its sources, each split into words once. finish None: unknown (a caption read from a file)."""

    __slots__ = ("finish", "fused", "raw", "synthetic")

    def __init__(self, raw: str, synthetic: str, fused: str, finish: FinishReason | None) -> None:
        self.raw = source_words(raw[:MAX_READ])
        self.synthetic = source_words(synthetic[:MAX_READ])
        self.fused = source_words(fused[:MAX_READ])  # read as a source is, because a model copies HTML entities, too
        self.finish = finish


def quoted(text: str) -> str:
    """At most 60 characters of a text, in quotes."""
    return f"'{text if len(text) <= 60 else text[:57] + '…'}'"


def clip(detail: str) -> str:
    """The detail on one line of at most MAX_DETAIL characters, without lone surrogates, because it is stored as UTF-8."""
    detail = SURROGATE.sub("\ufffd", " ".join(detail.split()))
    return detail if len(detail) < MAX_DETAIL else detail[: MAX_DETAIL - 2] + "…"
