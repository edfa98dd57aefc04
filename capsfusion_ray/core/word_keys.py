"""Split a caption into words, and fold each word into a key: two words are the same if their keys are equal. Pure.

`key_of` folds away case, accents, plural, possessive, digit grouping, number words and ordinals. A word of several parts is also
known by these (64GB = 64 GB, BlackBerry = black berry), and two neighbours by their join (smart watch = smartwatch).

Speed: what is decided per word is decided once per process and stored in `_Lexicon`, because captions use the same words again
and again. Per caption there remain one regex scan and set operations.
"""

from __future__ import annotations

import html
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable

# Han, kana, Thai, Lao, Myanmar and Khmer are written without spaces. Hangul is written with spaces.
SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff"
SPACELESS += "\uff66-\uff9f\U00020000-\U0003ffff"


def _combining_marks() -> str:
    """All combining marks, as the body of a regex class. `\\w` does not match them, which would split Hindi and Hebrew words."""
    out, start = [], -1
    for point in range(0x300, 0x20000):  # higher code points have only variation selectors and tags
        mark = unicodedata.category(chr(point))[0] == "M"
        if mark and start < 0:
            start = point
        elif not mark and start >= 0:
            out.append(f"{chr(start)}-{chr(point - 1)}")
            start = -1
    return "".join(out)


_MARKS = _combining_marks()
# The pattern begins with one character class and no alternative, which is a third faster than a separate pattern for numbers.
_ASCII_WORD = re.compile(r"[A-Za-z0-9]+(?:'[A-Za-z0-9]+|(?<=[0-9])[.,][0-9]+)*")
_WORD = re.compile(
    rf"[{SPACELESS}]|(?:(?![{SPACELESS}])[^\W_])"
    rf"(?:(?![{SPACELESS}])[^\W_]|[{_MARKS}]|['’ʼ](?=[^\W_])|(?<=\d)[.,]\d+)*"
)
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

_MAX_WORD = 64  # characters; longer "words" are hashes and base64, which do not repeat
_MAX_LEXICON = 300_000  # words, at most about 100 MB; then the lexicon is emptied


def _fold(word: str) -> str:
    """The word without case, width, accents and differences of apostrophes."""
    if word.isascii():
        return word.lower()
    folded = unicodedata.normalize("NFKD", word).casefold()
    return "".join(c for c in folded if not unicodedata.combining(c)).replace("’", "'").replace("ʼ", "'")


def canonical_number(digits: str) -> str:
    """`1,000` and `1.000` -> `1000`; `2.50` and `2,5` -> `2.5`; `007` -> `7`. Dates and versions are not changed."""
    if _GROUPED.fullmatch(digits):
        first = next(
            c for c in digits if not c.isdecimal()
        )  # the first mark groups digits, so the other one is the decimal mark
        digits = digits.replace(first, "")
    digits = digits.replace(",", ".")
    if digits.count(".") == 1:
        whole, fraction = digits.split(".")
        fraction = fraction.rstrip("0")
        digits = f"{whole}.{fraction}" if fraction else whole
    return digits.lstrip("0") or "0" if digits.count(".") == 0 else digits


def _stem(word: str) -> str:
    """The word without an English plural. The singular is changed in the same way: cities and city -> citi."""
    if len(word) <= 3:
        return word
    word = _IRREGULAR.get(word, word)
    if word[-1] == "s" and word[-2] not in "su":
        word = word[:-1]
    if word[-1] == "e" and (word[-2] in "sxzi" or word[-3:-1] in ("ch", "sh")):
        word = word[:-1]  # houses, boxes, watches, movies
    return word[:-1] + "i" if word[-1] == "y" and word[-2] not in "aeou" else word


class _Lexicon(dict[str, str]):
    """Word as written -> key, filled when a word is first asked for; also the parts and numbers of the few words that have them."""

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
key_of: Callable[[str], str] = _LEXICON.__getitem__  # the key of a word

# bytes.translate is ten times as fast as str.translate.
_PLAIN = bytes(point if point < 128 and chr(point).isalnum() else ord(" ") for point in range(256))
_NUMBERED = bytes(
    ord("0") if chr(point) in "0123456789" else ord(".") if chr(point) in ".," else ord(" ") for point in range(256)
)


def split_words(text: str) -> list[str]:
    """The words as written. Nine captions in ten need no regular expression, which takes three times as long."""
    if not text.isascii():
        found: list[str] = _WORD.findall(text)
        return found
    data = text.encode()
    if b"'" in data or b"0.0" in data.translate(_NUMBERED):
        found = _ASCII_WORD.findall(text)
        return found
    return data.translate(_PLAIN).decode().split()


class Words:
    """One caption, split once: `words` as written, `keys` in the same order, and `held`, the set of keys including those of parts."""

    __slots__ = ("_joins", "held", "keys", "text", "words")

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = words = split_words(text)
        self.keys = keys = list(map(key_of, words))  # map is a loop in C, which takes half the time
        self.held = held = set(keys)
        if not _PARTS.keys().isdisjoint(words):
            held.update(*map(_PARTS.__getitem__, _PARTS.keys() & words))
        self._joins: set[str] | None = None

    @property
    def joins(self) -> set[str]:
        """The keys of each word and the next one, written as one word."""
        if self._joins is None:
            self._joins = set(map(str.__add__, self.keys, self.keys[1:]))
        return self._joins

    def numbers(self) -> list[str]:
        """Canonical numbers written in digits, in order, repeated as in the text."""
        if _NUMBERS.keys().isdisjoint(self.words):
            return []
        return [n for w in self.words if w in _NUMBERS for n in _NUMBERS[w]]

    def holds(self, word: str, key: str) -> bool:
        """Whether this caption has a word of another one, as it is, by its parts, or as a join. (`align` also tries its neighbours.)"""
        if key in self.held:
            return True
        parts = _PARTS.get(word)
        return (parts is not None and parts != () and self.held.issuperset(parts)) or key in self.joins


def source_words(text: str) -> Words:
    """A source caption, split. HTML entities of alt text are decoded, so that their digits and letters are not words."""
    return Words(html.unescape(text) if "&" in text else text)
