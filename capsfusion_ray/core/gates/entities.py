"""Gates for numbers and names: those that no source has, and those of the raw caption that are missing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import pairwise

from capsfusion_ray.core.gates.triple import Fault, Triple, quoted
from capsfusion_ray.core.gates.words import BOILERPLATE_KEYS, STOP_KEYS
from capsfusion_ray.core.word_keys import Words, key_of


def unsupported_number(t: Triple) -> Fault | None:
    """How many numbers, written in digits, are in neither source."""
    found = t.fused.numbers()
    if not found:
        return None
    in_raw, in_synthetic = t.raw.held, t.synthetic.held
    missing = [n for n in found if n not in in_raw and n not in in_synthetic]
    if not missing:
        return None
    grouped = " ".join(_GROUP_SPACE.sub("", source.text) for source in (t.raw, t.synthetic))
    sources = [*t.raw.numbers(), *t.synthetic.numbers(), *Words(grouped).numbers()]
    task = set(_SENTENCE_NUMBER.findall(t.fused.text))  # instruction_echo judges these
    missing = [n for n in dict.fromkeys(missing) if not (n in task or _number_held(n, sources))]
    return Fault(len(missing), _neither(missing)) if missing else None


_GROUP_SPACE = re.compile(r"(?<=\d),?\s(?=\d{3}\b)")  # 185 000, and 15, 000 as some captioners write it
_SENTENCE_NUMBER = re.compile(r"[Ss]entence ([12])\b")


def _number_held(number: str, sources: Sequence[str]) -> bool:
    """Whether a source writes the number in another form: 2017 in '17 or 11-18-17, 2016 and 5 in 20160502."""
    for other in sources:
        if number == other:
            return True
        if len(other) > 4 and (number in other if len(number) > 1 else f"0{number}" in other):
            return True
        if len(number) == 4 and number[:2] in ("19", "20") and len(other) < 3 and number[2:].lstrip("0") == other:
            return True
    return False


def _neither(values: Sequence[str]) -> str:
    shown = ", ".join(quoted(v) for v in values[:4])
    return f"{shown}{' and more' if len(values) > 4 else ''} {'is' if len(values) == 1 else 'are'} in neither source"


# Capitalised by custom; they name nothing.
_NO_NAMES = frozenset(
    (
        "I",
        "TV",
        "DVD",
        "CD",
        "PC",
        "ID",
        "OK",
        "AM",
        "PM",
        "Mr",
        "Mrs",
        "Ms",
        "Dr",
        "Sentence",
        "Inc",
        "Internet",
        "ISBN",
        "He",
        "You",
        "We",
        "I'm",
        "I've",
    )
)
_MONTHS = (
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
)
# Countries and their adjectives that do not begin with the same four letters.
_DEMONYMS = frozenset(
    map(
        frozenset,
        (
            ("spain", "spanish"),
            ("france", "french"),
            ("poland", "polish"),
            ("ireland", "irish"),
            ("wales", "welsh"),
            ("netherlands", "dutch"),
            ("holland", "dutch"),
            ("denmark", "danish"),
            ("britain", "british"),
            ("uk", "british"),
            ("switzerland", "swiss"),
            ("greece", "greek"),
            ("uk", "united"),
            ("uk", "kingdom"),
            ("usa", "american"),
            ("us", "american"),
            ("peru", "peruvian"),
        ),
    )
)


def unsupported_name(t: Triple) -> Fault | None:
    """How many capitalised words inside a sentence are in neither source, also not in another form (American, NYC, a corrected typo)."""
    unheld = t.fused.held - t.raw.held - t.synthetic.held
    if not unheld:
        return None
    missing = [w for w, k in zip(t.fused.words, t.fused.keys, strict=True) if k in unheld and w[0].isupper()]
    if not missing:
        return None
    text = t.fused.text
    missing = [w for w in dict.fromkeys(missing) if len(w) > 1 and w not in _NO_NAMES and _inside_sentence(w, text)]
    if not missing:
        return None
    missing = [w for w in missing[:50] if not _name_held(w, t)]
    return Fault(len(missing), _neither(missing)) if missing else None


def _inside_sentence(word: str, text: str) -> bool:
    """Whether the word first occurs after another word or a comma, and not at the start of a sentence, where all words are capitalised."""
    at = text.find(word)
    if at < 2 or not (text[at - 1] in " -/('’" or text[at - 1].isspace()):
        return False
    before = text[at - 2]
    return before.isalnum() or before in ",;)'’&-"


def _name_held(word: str, t: Triple) -> bool:
    """Whether a source has the name in any form."""
    low, key = word.lower(), key_of(word)
    if t.raw.holds(word, key) or t.synthetic.holds(word, key):
        return True
    for source in (t.raw, t.synthetic):
        if (len(low) > 3 and low in source.text.lower()) or (len(word) > 2 and word in source.text):
            return True  # johnlewis.com, #CMTawards
        for other in source.words[:200]:
            if _same_name(low, word, other):
                return True
        if word.isupper() and 1 < len(word) < 7 and low in "".join([k[0] for k in source.keys]):  # UK
            return True
    if low in _MONTHS:
        month = str(_MONTHS.index(low) + 1)
        return any(month == n or (len(n) > 5 and month in n) for n in (*t.raw.numbers(), *t.synthetic.numbers()))
    return _spelled_out(word, t)


def _same_name(low: str, word: str, other: str) -> bool:
    """Whether two words name the same: equal beginnings, country and people, an abbreviation, or a spelling that is close."""
    against = other.lower()
    if len(against) < 2 or against[0] != low[0]:
        return frozenset((low, against)) in _DEMONYMS
    if len(low) > 4 and len(against) > 3 and low[:4] == against[:4] and abs(len(low) - len(against)) < 6:
        return True  # America, American
    if frozenset((low, against)) in _DEMONYMS:
        return True
    if other[0].isupper() and len(against) < 5 and len(low) > len(against):  # CA, Vol, St
        rest = iter(low)
        return all(c in rest for c in against)
    return (
        3 < len(low) < 40 and abs(len(low) - len(against)) < 4 and SequenceMatcher(None, low, against).ratio() >= 0.75
    )


def _spelled_out(word: str, t: Triple) -> bool:
    """Whether the word and its neighbours spell out an acronym of a source: NYC, U.S., IAAF (function words such as "of" are skipped)."""
    keys = [k for k in t.fused.keys[:300] if k not in STOP_KEYS]
    if (key := key_of(word)) not in keys:
        return False
    at, initials = keys.index(key), "".join([k[0] for k in keys])
    for source in (t.raw, t.synthetic):
        pairs = [a + b for a, b in pairwise(source.words) if len(a) == len(b) == 1]
        for other in (*source.words, *pairs):
            if 1 < len(other) < 7 and other.isupper():
                found = initials.find(other.lower(), max(at - len(other) + 1, 0))
                if 0 <= found <= at < found + len(other):
                    return True
    return False


_FILE_ID = re.compile(
    r"\d{6,}|.*[a-z]\d.*[a-z]|.*\d[a-z]+\d.*", re.IGNORECASE
)  # 20160502, a1b2c3: ids of files, which name nothing


def is_entity(word: str, key: str) -> bool:
    """Whether a word is a name or a number by its first character, and has content."""
    first = word[0]
    return (first.isupper() or first.isdecimal()) and key not in STOP_KEYS and key not in BOILERPLATE_KEYS


def lost_entity(t: Triple) -> Fault | None:
    """Share of the raw caption's names and numbers that the fused caption lacks; 0 if the raw one has fewer than two."""
    held = t.fused.held
    missing = t.raw.held - held
    if not missing:
        return None
    entities = {k: w for w, k in zip(t.raw.words, t.raw.keys, strict=True) if is_entity(w, k)}
    if len(entities) < 2:
        return None
    lost = entities.keys() & missing
    text, numbers = t.fused.text.lower(), t.fused.numbers()
    gone = []
    for key, word in entities.items():
        if key not in lost:
            continue
        if _FILE_ID.fullmatch(word) or t.fused.holds(word, key) or (len(word) > 3 and word.lower() in text):
            continue
        if word[0].isdecimal() and _number_held(key, numbers):
            continue
        gone.append(word)
    if not gone:
        return None
    shown = ", ".join(quoted(w) for w in gone[:4])
    return Fault(
        len(gone) / len(entities),
        f"{shown} of raw {'is' if len(gone) == 1 else 'are'} gone ({len(gone)} of {len(entities)})",
    )
