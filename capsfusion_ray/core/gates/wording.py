"""Gates for the wording of a caption: parts of the prompt, cut ends, repetition, pasted sources, length."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice, pairwise

from capsfusion_ray.core.gates.triple import Fault, Triple, quoted
from capsfusion_ray.core.gates.words import STOP_KEYS
from capsfusion_ray.core.types import FinishReason

_ECHO_HINTS = (
    "sentence",
    "real-world",
    "real world",
    "in-depth",
    "well-structured",
    "false ",
    "grammar",
    "merge",
    "accurate",
)
# 2 points: the text talks about the task, as no caption of a picture does.
_ECHO_TASK = re.compile(
    r"\bsentences? ?(?:structures?\b|[12]\b|one\b|two\b)|\b(?:first|second|two|both|new|given|combined|merged|refined) sentences?\b"
    r"|\bwell-structured sentence|\bthe sentence\b|^(?:new )?sentence:|\bflaws in\b|\bgrammar\b|\bsimply concatenat"
    r"|\bfalse (?:information|details?)\b|\black(?:s|ing|ed)? (?:of )?(?:in-depth|depth|detailed|real-world)"
    r"|\b(?:may|does|do|is|are) not (?:an? )?accurate(?:ly)? (?:represent|describe|reflect|description|representation)"
    r"|\bmerge and refine|\brefined and merged|\bin-depth (?:real-world|details?|information|knowledge)"
)
# 1 point: a phrase of the instruction used in the caption.
_ECHO_PHRASE = re.compile(
    r"\bdetailed (?:and \w+ )?(?:real-world|knowledge)\b"
    r"|\breal-world (?:knowledge|details?|information|scenario|setting|view|product|item|representation|model|data)\b"
    r"|\bwell-structured and detailed\b|\bdetailed and well-structured\b|\bin the real world\b|\bwell-structured\b"
)


def instruction_echo(t: Triple) -> Fault | None:
    """Points for the distinct phrases of the instruction that neither source has."""
    low = t.fused.text.lower()
    if not any(map(low.__contains__, _ECHO_HINTS)):
        return None
    sources = f"{t.raw.text}\n{t.synthetic.text}".lower()
    found: dict[str, int] = {}
    for pattern, points in ((_ECHO_TASK, 2), (_ECHO_PHRASE, 1)):
        for match in pattern.finditer(low):
            if match[0] not in sources:
                found.setdefault(match[0], points)
    if not found:
        return None
    phrases = ", ".join(f"'{p}'" for p in islice(found, 3))
    return Fault(sum(found.values()), f"{phrases} is the instruction's")


def empty_output(t: Triple) -> Fault | None:
    """1 if the engine wrote no word."""
    return None if t.fused.words else Fault(1.0, f"{len(t.fused.text)} characters, no word")


_SENTENCE_END = re.compile(r"[.!?…。！？｡।؟][\"'”’»)\]」』）*]*$")


def cut_off(t: Triple) -> Fault | None:
    """2 if the caption begins inside a sentence; 1 if it ends inside one.

    It begins inside a sentence if the synthetic caption was cut off and the model continued it. It ends inside one if it stopped
    at max_new_tokens, or, if the finish is unknown, if it has no full stop.
    """
    first = t.fused.text[:1]
    if first.islower() and first.isascii():
        begun = t.fused.text[:12].lower() == t.synthetic.text.lstrip()[:12].lower() or t.raw.text[:1].islower()
        if not begun and not _SENTENCE_END.search(t.synthetic.text.rstrip()[-12:]):
            return Fault(2.0, f"goes on where synthetic stops, begins {quoted(t.fused.text[:30])}")
    if t.finish is FinishReason.EOS:
        return None
    if t.finish is FinishReason.LENGTH:
        return Fault(1.0, f"no end of text at max_new_tokens, ends {quoted(t.fused.text[-30:])}")
    if _SENTENCE_END.search(t.fused.text[-12:]):
        return None
    return Fault(1.0, f"no full stop, ends {quoted(t.fused.text[-30:])}")


def _fourgrams(keys: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(keys, keys[1:], keys[2:], keys[3:], strict=False))


def repetition(t: Triple) -> Fault | None:
    """Share of the 4-grams that repeat earlier ones of the caption, without those that a source repeats as often."""
    keys = t.fused.keys
    if len(keys) - len(set(keys)) < 4 or len(keys) - len(t.fused.joins) < 4:
        return None  # a repeated 4-gram has four repeated words and three repeated pairs of neighbours
    grams = _fourgrams(keys)
    again = len(grams) - len(set(grams))
    if again == 0:
        return None
    counts = Counter(grams)
    in_raw, in_synthetic = Counter(_fourgrams(t.raw.keys)), Counter(_fourgrams(t.synthetic.keys))
    extra = {g: n - max(in_raw[g], in_synthetic[g], 1) for g, n in counts.items() if n > 1}
    again = sum(n for n in extra.values() if n > 0)
    if again == 0:
        return None
    worst = max(extra, key=lambda g: extra[g])
    return Fault(again / len(grams), f"'{' '.join(worst)}' {counts[worst]} times")


def _sequence(keys: Sequence[str]) -> str:
    return f" {' '.join(keys)} "


def concatenation(t: Triple) -> Fault | None:
    """Share of the words that are both sources pasted verbatim; a few words between them are allowed."""
    raw, synthetic, fused = t.raw.keys, t.synthetic.keys, t.fused.keys
    if len(raw) < 3 or len(synthetic) < 3 or len(fused) < len(raw) + len(synthetic):
        return None
    if not t.fused.held.issuperset(synthetic):
        return None
    line = _sequence(fused)
    if _sequence(synthetic) not in line or _sequence(raw) not in line:
        return None
    share = (len(raw) + len(synthetic)) / len(fused)
    return Fault(share, f"both sources verbatim make {share:.0%} of it")


def copy_of_one(t: Triple) -> Fault | None:
    """Share of the word pairs that are those of one source, if the other source has more words and none of these is used."""
    fused = t.fused.keys
    for name, source, other in (("raw", t.raw, t.synthetic), ("synthetic", t.synthetic, t.raw)):
        size = len(source.keys)
        if size < 2 or not 0.8 * size <= len(fused) <= 1.25 * size:
            continue
        grams = set(zip(source.keys, source.keys[1:], strict=False))
        share = sum(map(grams.__contains__, pairwise(fused))) / max(len(fused) - 1, 1)
        added = other.held - source.held - STOP_KEYS
        if share >= 0.5 and added and added.isdisjoint(t.fused.held):
            return Fault(share, f"{share:.0%} of its word pairs are {name}'s, nothing is the other's")
    return None


def too_short(t: Triple) -> Fault | None:
    """Words of the longer source per fused word; infinite for one or two words made of five or more."""
    fused = len(t.fused.keys)
    source = max(len(t.raw.keys), len(t.synthetic.keys))
    if fused >= source:
        return None
    size = source / fused if fused > 2 or (fused and source < 5) else math.inf
    return Fault(size, f"{fused} words from {source}")


def too_long(t: Triple) -> Fault | None:
    """Fused words per word of both sources together."""
    fused = len(t.fused.keys)
    source = len(t.raw.keys) + len(t.synthetic.keys)
    return Fault(fused / max(source, 1), f"{fused} words from {source}") if fused > source else None
