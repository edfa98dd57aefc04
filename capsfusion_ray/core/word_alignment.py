"""Fused words -> RAW | SYNTHETIC | BOTH | NEITHER. Pure: knows no verdicts, no Arrow, no files.

Two words are the same when their keys are: case, accents, plural, possessive, digit grouping, number words and
ordinals are folded away (`key_of`). A word that no source holds gets two more chances: its parts (64GB = 64 GB,
BlackBerry = black berry) and its joins with a neighbour (smart watch = smartwatch). Scripts written without spaces
have no words to compare, so there a character counts as taken over when a pair of neighbours it belongs to was.

Speed: everything that is decided per word is decided once per process and remembered (`_Lexicon`), because captions
use the same words over and over; what is left per caption is a regex scan and set operations.
"""

from __future__ import annotations

import html
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable
from enum import StrEnum
from functools import partial
from typing import NamedTuple


class Origin(StrEnum):
    """Which source holds a fused word."""

    RAW = "raw"
    SYNTHETIC = "synthetic"
    BOTH = "both"
    NEITHER = "neither"


_ORIGINS = (Origin.NEITHER, Origin.RAW, Origin.SYNTHETIC, Origin.BOTH)  # raw holds it: 1, synthetic holds it: 2
_NEITHER, _RAW, _SYNTHETIC, _BOTH = _ORIGINS


class Span(NamedTuple):
    """`fused[start:end]`, one word or a run of spaceless script, and where it came from. Offsets in code points."""

    start: int
    end: int
    origin: Origin


# Han, kana, Thai, Lao, Myanmar, Khmer: written without spaces. Hangul has spaces.
SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff"
SPACELESS += "\uff66-\uff9f\U00020000-\U0003ffff"


def _combining_marks() -> str:
    """A regex class body of all combining marks: `\\w` leaves them out, which would cut Hindi and Hebrew words apart."""
    out, start = [], -1
    for point in range(0x300, 0x20000):  # above are only variation selectors and tags
        mark = unicodedata.category(chr(point))[0] == "M"
        if mark and start < 0:
            start = point
        elif not mark and start >= 0:
            out.append(f"{chr(start)}-{chr(point - 1)}")
            start = -1
    return "".join(out)


_MARKS = _combining_marks()
# It begins with a plain character class and has no alternative there: a third faster than with numbers in front.
_ASCII_WORD = re.compile(r"[A-Za-z0-9]+(?:'[A-Za-z0-9]+|(?<=[0-9])[.,][0-9]+)*")
_WORD = re.compile(
    rf"[{SPACELESS}]|(?:(?![{SPACELESS}])[^\W_])"
    rf"(?:(?![{SPACELESS}])[^\W_]|[{_MARKS}]|['’ʼ](?=[^\W_])|(?<=\d)[.,]\d+)*"
)
_SPACELESS_CHAR = re.compile(f"[{SPACELESS}]")
_GROUPED = re.compile(r"[1-9]\d{0,2}(?:(?:,\d{3})+(?:\.\d+)?|(?:\.\d{3})+(?:,\d+)?)")
_DATED = re.compile(r"[.,]\d*[.,]|[.,](?:\d\d|\d{4,})$")  # 2013.07.20, 8.15 p.m., March 06,2010
_DIGITS = re.compile(r"\d+(?:[.,]\d+)*")
_PIECES = re.compile(r"\d+|[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_]+")

_COUNTED = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred
"""
_ORDERED = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
_NUMBER_WORDS = dict(zip(_COUNTED.split(), map(str, [*range(21), *range(30, 101, 10)]), strict=True))
_NUMBER_WORDS |= {
    word: f"{n}{({1: 'st', 2: 'nd', 3: 'rd'}).get(n, 'th')}" for n, word in enumerate(_ORDERED.split(), 1)
}
_IRREGULAR = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "feet": "foot",
    "teeth": "tooth",
    "mice": "mouse",
    "geese": "goose",
    "leaves": "leaf",
    "knives": "knife",
    "wives": "wife",
    "wolves": "wolf",
    "shelves": "shelf",
    "halves": "half",
    "scarves": "scarf",
    "loaves": "loaf",
    "lives": "life",
}

_MAX_WORD = 64  # characters; longer "words" are hashes and base64, never worth remembering
_MAX_LEXICON = 300_000  # words, about 100 MB at worst; then it starts over


def _fold(word: str) -> str:
    """Case, width, accents and apostrophes folded away."""
    if word.isascii():
        return word.lower()
    folded = unicodedata.normalize("NFKD", word).casefold()
    return "".join(c for c in folded if not unicodedata.combining(c)).replace("’", "'").replace("ʼ", "'")


def canonical_number(digits: str) -> str:
    """`1,000` and `1.000` -> `1000`; `2.50` and `2,5` -> `2.5`; `007` -> `7`. Dates and versions stay as they are."""
    if _GROUPED.fullmatch(digits):
        first = next(c for c in digits if not c.isdecimal())  # the grouping mark; a decimal mark is the other one
        digits = digits.replace(first, "")
    digits = digits.replace(",", ".")
    if digits.count(".") == 1:
        whole, fraction = digits.split(".")
        fraction = fraction.rstrip("0")
        digits = f"{whole}.{fraction}" if fraction else whole
    return digits.lstrip("0") or "0" if digits.count(".") == 0 else digits


def _stem(word: str) -> str:
    """English plural folded away, the same way for the singular, so that both meet: cities, city -> citi."""
    if len(word) <= 3:
        return word
    word = _IRREGULAR.get(word, word)
    if word[-1] == "s" and word[-2] not in "su":
        word = word[:-1]
    if word[-1] == "e" and (word[-2] in "sxzi" or word[-3:-1] in ("ch", "sh")):
        word = word[:-1]  # houses, boxes, watches, movies
    return word[:-1] + "i" if word[-1] == "y" and word[-2] not in "aeou" else word


class _Lexicon(dict[str, str]):
    """word as written -> key, filled on first sight; beside it, for the few words that have them, parts and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, tuple[str, ...]] = {}  # keys of the pieces of 64GB, 2nd, BlackBerry, 2013.07.20
        self.numbers: dict[str, tuple[str, ...]] = {}  # canonical numbers inside a word

    def __missing__(self, word: str) -> str:
        if len(self) >= _MAX_LEXICON:
            self.clear()
            self.parts.clear()
            self.numbers.clear()
        key = self._learn(word)
        if len(word) <= _MAX_WORD:
            self[word] = key
        return key

    def _learn(self, word: str) -> str:
        folded = _fold(word)
        if "'" in folded:
            folded = folded.removesuffix("'s").replace("'", "")
        if word.isalpha() and not word.isupper() and not (word[1:].islower() or len(word) == 1):
            self._add_parts(word, [p for p in _PIECES.findall(word) if len(p) > 2])
        if any(map(str.isdecimal, folded)):
            if not folded.isascii():  # Arabic-Indic, Devanagari and other decimal digits
                folded = "".join(str(unicodedata.digit(c)) if c.isdecimal() else c for c in folded)
            return self._learn_number(word, folded)
        return sys.intern(_NUMBER_WORDS.get(folded) or _stem(folded))

    def _learn_number(self, word: str, folded: str) -> str:
        if len(word) > _MAX_WORD:
            return folded
        found = _DIGITS.findall(folded)
        values = [canonical_number(d) for d in found]
        dotted = [
            canonical_number(d)
            for n in found
            if _DATED.search(n) and not _GROUPED.fullmatch(n)
            for d in re.split("[.,]", n)
        ]
        self.numbers[word] = tuple(v for v in values if v.count(".") < 2) + tuple(dotted)
        if len(found) == 1 and found[0] == folded:
            if dotted:
                self.parts[word] = tuple(dotted)
            return values[0]
        pieces = [canonical_number(p) if p[0].isdecimal() else p for p in _PIECES.findall(folded)]
        if folded.endswith("s") and len(pieces) == 2:
            return pieces[0]  # 1960s, 1960's
        self._add_parts(word, pieces)
        return folded

    def _add_parts(self, word: str, pieces: Iterable[str]) -> None:
        parts = tuple(_stem(_fold(p)) for p in pieces)
        if parts and len(word) <= _MAX_WORD:
            self.parts[word] = parts


_LEXICON = _Lexicon()


_PARTS, _NUMBERS = _LEXICON.parts, _LEXICON.numbers
key_of: Callable[[str], str] = _LEXICON.__getitem__  # what two writings of one word have in common

# Bytes are translated ten times as fast as text.
_PLAIN = bytes(point if point < 128 and chr(point).isalnum() else ord(" ") for point in range(256))
_NUMBERED = bytes(
    ord("0") if chr(point) in "0123456789" else ord(".") if chr(point) in ".," else ord(" ") for point in range(256)
)


def _words(text: str) -> list[str]:
    """The words as written. Nine captions in ten need no regular expression, which takes thrice as long."""
    if not text.isascii():
        found: list[str] = _WORD.findall(text)
        return found
    data = text.encode()
    if b"'" in data or b"0.0" in data.translate(_NUMBERED):
        found = _ASCII_WORD.findall(text)
        return found
    return data.translate(_PLAIN).decode().split()


class Words:
    """One caption, taken apart once: `words` as written, `keys` in order, `held` the keys it can vouch for."""

    __slots__ = ("_joins", "held", "keys", "text", "words")

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = words = _words(text)
        self.keys = keys = list(map(key_of, words))  # a loop in C: half the time
        self.held = held = set(keys)
        if not _PARTS.keys().isdisjoint(words):
            held.update(*map(_PARTS.__getitem__, _PARTS.keys() & words))
        self._joins: set[str] | None = None

    @property
    def joins(self) -> set[str]:
        """Neighbouring keys written as one word."""
        if self._joins is None:
            self._joins = set(map(str.__add__, self.keys, self.keys[1:]))
        return self._joins

    def numbers(self) -> list[str]:
        """Canonical numbers written in digits, in order, repeated as in the text."""
        if _NUMBERS.keys().isdisjoint(self.words):
            return []
        return [n for w in self.words if w in _NUMBERS for n in _NUMBERS[w]]

    def holds(self, word: str, key: str) -> bool:
        """Whether this caption vouches for a word of another one, read alone (see `align` for its neighbours)."""
        if key in self.held:
            return True
        parts = _PARTS.get(word)
        return (parts is not None and parts != () and self.held.issuperset(parts)) or key in self.joins


def source_words(text: str) -> Words:
    """A source caption taken apart; alt text comes with HTML entities, whose digits and letters are no words."""
    return Words(html.unescape(text) if "&" in text else text)


def _pairs(chars: str) -> set[str]:
    """Neighbouring characters, where both are of a spaceless script; single characters of runs of one."""
    out: set[str] = set()
    for run in re.findall(f"[{SPACELESS}]+", chars):
        out.update(map(str.__add__, run, run[1:]))
        out.update(run)
    return out


def align(fused: str, raw: str, synthetic: str) -> list[Span]:
    """The origin of every word of `fused`, in order, without gaps but for what is no word."""
    return align_words(fused, source_words(raw), source_words(synthetic))


def align_words(fused: str, raw: Words, synthetic: Words) -> list[Span]:
    """`align` for sources already taken apart."""
    words = _words(fused)
    keys = list(map(key_of, words))
    in_raw, in_synthetic = raw.held, synthetic.held
    origins = [
        (_BOTH if key in in_synthetic else _RAW) if key in in_raw else (_SYNTHETIC if key in in_synthetic else _NEITHER)
        for key in keys
    ]
    if _NEITHER in origins:
        _second_chances(words, keys, origins, raw, synthetic)
    find, end, spans = fused.find, 0, list[Span]()
    for word, origin in zip(words, origins, strict=True):
        start = find(word, end)  # nothing between two words can begin one, so this is the word's own place
        end = start + len(word)
        spans.append(_span((start, end, origin)))
    runs = not fused.isascii() and _SPACELESS_CHAR.search(fused) is not None
    return _join_runs(fused, spans, raw.text, synthetic.text) if runs else spans


_span = partial(tuple.__new__, Span)  # Span(…) without its checks: half the time


def _second_chances(words: list[str], keys: list[str], origins: list[Origin], raw: Words, synthetic: Words) -> None:
    """Words that no source holds as they are: by their parts and joins, or together with the word before (in place)."""
    loose = -2  # index of the last word that no source holds at all
    for at, origin in enumerate(origins):
        if origin is not _NEITHER:
            continue
        word, key = words[at], keys[at]
        origins[at] = _ORIGINS[raw.holds(word, key) + 2 * synthetic.holds(word, key)]
        if origins[at] is not _NEITHER:
            continue
        if loose == at - 1:
            joined = keys[loose] + key  # smart watch, where a source wrote smartwatch
            found = _ORIGINS[(joined in raw.held) + 2 * (joined in synthetic.held)]
            if found is not _NEITHER:
                origins[loose] = origins[at] = found
        loose = at


def _join_runs(fused: str, spans: list[Span], raw: str, synthetic: str) -> list[Span]:
    """Characters of spaceless scripts judged by their neighbours, and joined to one span per run and origin."""
    raw_pairs, synthetic_pairs = _pairs(raw), _pairs(synthetic)

    def held(start: int, end: int, pairs: set[str]) -> bool:
        left = start > 0 and _SPACELESS_CHAR.match(fused, start - 1) is not None
        right = end < len(fused) and _SPACELESS_CHAR.match(fused, end) is not None
        if not (left or right):
            return fused[start:end] in pairs
        return (left and fused[start - 1 : end] in pairs) or (right and fused[start : end + 1] in pairs)

    out: list[Span] = []
    joinable = False
    for span in spans:
        if _SPACELESS_CHAR.match(fused, span.start) is None:
            out.append(span)
            joinable = False
            continue
        start, end, _ = span
        origin = _ORIGINS[held(start, end, raw_pairs) + 2 * held(start, end, synthetic_pairs)]
        if joinable and out[-1].end == start and out[-1].origin == origin:
            out[-1] = Span(out[-1].start, end, origin)
        else:
            out.append(Span(start, end, origin))
        joinable = True
    return out
