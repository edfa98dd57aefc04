"""Align a fused caption with its sources: each word comes from RAW, SYNTHETIC, BOTH or NEITHER. Pure: knows no verdicts and no files.

Words are compared by their keys (word_keys). A word that no source has is also tried by its parts and by its join with a
neighbour. Scripts without spaces have no words, so there a character comes from a source if a pair of neighbours with it does.
"""

from __future__ import annotations

import re
from enum import StrEnum
from functools import partial
from typing import NamedTuple

from capsfusion_ray.core.word_keys import SPACELESS, Words, key_of, source_words, split_words

_SPACELESS_CHAR = re.compile(f"[{SPACELESS}]")


class Origin(StrEnum):
    """The source that has a fused word."""

    RAW = "raw"
    SYNTHETIC = "synthetic"
    BOTH = "both"
    NEITHER = "neither"


_ORIGINS = (
    Origin.NEITHER,
    Origin.RAW,
    Origin.SYNTHETIC,
    Origin.BOTH,
)  # the index is 1 if raw has the word, plus 2 if synthetic has it
_NEITHER, _RAW, _SYNTHETIC, _BOTH = _ORIGINS


class CharSpan(NamedTuple):
    """`fused[start:end]` is one word or a run of spaceless script with one origin. Offsets are in code points."""

    start: int
    end: int
    origin: Origin


def _pairs(chars: str) -> set[str]:
    """Pairs of neighbouring characters of spaceless scripts, and the single characters of these runs."""
    out: set[str] = set()
    for run in re.findall(f"[{SPACELESS}]+", chars):
        out.update(map(str.__add__, run, run[1:]))
        out.update(run)
    return out


def align(fused: str, raw: str, synthetic: str) -> list[CharSpan]:
    """The origin of every word of `fused`, in order. What is not in a char span is no word.

    >>> [str(span.origin) for span in align("a red car", "red", "a car")]
    ['synthetic', 'raw', 'synthetic']
    """
    return align_words(fused, source_words(raw), source_words(synthetic))


def align_words(fused: str, raw: Words, synthetic: Words) -> list[CharSpan]:
    """`align` for sources that are split already."""
    words = split_words(fused)
    keys = list(map(key_of, words))
    in_raw, in_synthetic = raw.held, synthetic.held
    origins = [
        (_BOTH if key in in_synthetic else _RAW) if key in in_raw else (_SYNTHETIC if key in in_synthetic else _NEITHER)
        for key in keys
    ]
    if _NEITHER in origins:
        _second_chances(words, keys, origins, raw, synthetic)
    find, end, spans = fused.find, 0, list[CharSpan]()
    for word, origin in zip(words, origins, strict=True):
        start = find(word, end)  # the text between two words holds no word, so this finds the right place
        end = start + len(word)
        spans.append(_span((start, end, origin)))
    runs = not fused.isascii() and _SPACELESS_CHAR.search(fused) is not None
    return _join_runs(fused, spans, raw.text, synthetic.text) if runs else spans


_span = partial(tuple.__new__, CharSpan)  # CharSpan(…) without its checks takes half the time


def _second_chances(words: list[str], keys: list[str], origins: list[Origin], raw: Words, synthetic: Words) -> None:
    """Find words that no source has as they are by their parts and joins, or joined with the word before. Changes `origins`."""
    loose = -2  # index of the last word that no source has in any form
    for at, origin in enumerate(origins):
        if origin is not _NEITHER:
            continue
        word, key = words[at], keys[at]
        origins[at] = _ORIGINS[raw.holds(word, key) + 2 * synthetic.holds(word, key)]
        if origins[at] is not _NEITHER:
            continue
        if loose == at - 1:
            joined = keys[loose] + key  # smart watch, if a source has smartwatch
            found = _ORIGINS[(joined in raw.held) + 2 * (joined in synthetic.held)]
            if found is not _NEITHER:
                origins[loose] = origins[at] = found
        loose = at


def _join_runs(fused: str, spans: list[CharSpan], raw: str, synthetic: str) -> list[CharSpan]:
    """Decide the origin of characters of spaceless scripts by their neighbours, and join them to one char span per run and origin."""
    raw_pairs, synthetic_pairs = _pairs(raw), _pairs(synthetic)

    def held(start: int, end: int, pairs: set[str]) -> bool:
        left = start > 0 and _SPACELESS_CHAR.match(fused, start - 1) is not None
        right = end < len(fused) and _SPACELESS_CHAR.match(fused, end) is not None
        if not (left or right):
            return fused[start:end] in pairs
        return (left and fused[start - 1 : end] in pairs) or (right and fused[start : end + 1] in pairs)

    out: list[CharSpan] = []
    joinable = False
    for span in spans:
        if _SPACELESS_CHAR.match(fused, span.start) is None:
            out.append(span)
            joinable = False
            continue
        start, end, _ = span
        origin = _ORIGINS[held(start, end, raw_pairs) + 2 * held(start, end, synthetic_pairs)]
        if joinable and out[-1].end == start and out[-1].origin == origin:
            out[-1] = CharSpan(out[-1].start, end, origin)
        else:
            out.append(CharSpan(start, end, origin))
        joinable = True
    return out
