"""A caption pair, and what an engine made of it -> Verdict. Pure: knows no engine, no Arrow, no files, no clock.

Every gate is a function of one `Triple` that measures one fault: how bad (it grows with the fault, 0 where there is
none) and, for the reader, on what. What is done about it stands in GatesConfig: from `threshold` on the gate's action,
from `flag_from` on a flag. GATES is in the order in which the first rejecting gate names the reason; the others that
match are flags.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

from capsfusion_ray.config import GateConfig, GatesConfig
from capsfusion_ray.provenance import Words, key_of, source_words
from capsfusion_ray.rows import CaptionPair, FinishReason, Generation, Outcome, Reason, Verdict

MAX_DETAIL = 200  # characters


class Fault(NamedTuple):
    """How bad, and on what."""

    size: float
    detail: str


class Triple:
    """A fused caption beside its sources, each taken apart once. finish None: unknown (a caption read from a file)."""

    __slots__ = ("finish", "fused", "raw", "synthetic")

    def __init__(self, raw: str, synthetic: str, fused: str, finish: FinishReason | None) -> None:
        self.raw = source_words(raw)
        self.synthetic = source_words(synthetic)
        self.fused = Words(fused)
        self.finish = finish

    def unheld(self) -> list[str]:
        """Fused words, as written and in order, whose key neither source holds."""
        in_raw, in_synthetic = self.raw.held, self.synthetic.held
        pairs = zip(self.fused.words, self.fused.keys, strict=True)
        return [w for w, k in pairs if k not in in_raw and k not in in_synthetic]


# ------------------------------------------------------------------------------------------------ before the engine

# Function words: they say nothing about what is in the picture.
STOP_KEYS = frozenset(
    map(
        key_of,
        "a an and are as at be been being but by can for from had has have he her his how i if in into is it its just me"
        " my no not of off on one or our out over she so some than that the their them then there these they this to up"
        " was we were what when which while who will with without you your s t de la le el di del der die das und et"
        " y con en for image photo picture photograph showing shown show two three".split(),
    )
)

# Words of alt texts that describe the file or the page and not the picture. Only a caption made of nothing else is
# boilerplate: 'Giraffe-Drinking-Water-Images-540x337' keeps its giraffe.
BOILERPLATE_KEYS = frozenset(
    map(
        key_of,
        "image img images picture pic pics photo photos foto bild imagen photograph photography thumbnail thumb thumbs"
        " icon logo banner avatar screenshot screen shot capture dsc dscn dscf dscn pict mvc file files upload uploads"
        " download media attachment untitled unnamed default placeholder blank none null undefined nan na alt text"
        " title caption description here click tap to enlarge zoom view full size large medium small larger original"
        " scaled crop cropped resized copy final new edited edit version v px jpg jpeg png gif webp svg bmp tif tiff"
        " html htm php asp aspx www http https com wp content preview hero header footer slide slider gallery main"
        " product no available loading loader lazy image0 the a an of this is for more info and or in it s by x w h"
        " unsplash pexels pixabay whatsapp at am pm".split(),
    )
)
_HASHED = re.compile(r"(?=[a-z]*\d)[a-z0-9]{6,}|[0-9a-f]{8,}", re.IGNORECASE)  # 5f3a9c2e, B07KX9YQ2L
_SURROGATE = re.compile("[\ud800-\udfff]")


def is_boilerplate(text: str) -> bool:
    """Whether an alt text says nothing about the picture: 'image', 'IMG_1234.jpg', 'Click to enlarge', a number."""
    if len(text) > 300:
        return False
    words = re.sub(r"https?://[^/\s]+", " ", text)  # a host's name describes nothing, a path's words may
    for word in re.findall(r"[^\W_]+", words):
        if word.isdecimal() or key_of(word) in BOILERPLATE_KEYS or _HASHED.fullmatch(word):
            continue
        letters = word.rstrip("0123456789").lower()
        if letters != word.lower() and key_of(letters) in BOILERPLATE_KEYS:  # img20160502, dsc00012
            continue
        return False
    return True


def shared_content(raw: Words, synthetic: Words) -> set[str]:
    """Keys of the content words that both sources hold."""
    return (raw.held & synthetic.held) - STOP_KEYS


def judge_pair(pair: CaptionPair, gates: GatesConfig) -> Verdict | None:
    """The verdict on a pair that is not worth an engine's time; None: fuse it. A caption may be None (null column)."""
    return judge_sources(pair.raw, pair.synthetic, gates)


def judge_sources(raw: str | None, synthetic: str | None, gates: GatesConfig) -> Verdict | None:
    """`judge_pair` for the bare captions."""
    if raw is None or synthetic is None:
        name = "both captions" if raw is None and synthetic is None else "raw" if raw is None else "synthetic"
        return _route(Reason.NULL_CAPTION, gates.null_caption, f"{name} null", raw, synthetic)
    for name, text in (("raw", raw), ("synthetic", synthetic)):
        if not text.isascii() and (found := _SURROGATE.search(text)):
            return Verdict(Outcome.REJECTED, Reason.INVALID_UTF8, f"{name} has a lone surrogate at {found.start()}")
    if not _says(raw) or not _says(synthetic):
        name = "raw" if not _says(raw) else "synthetic"
        return _route(Reason.EMPTY_CAPTION, gates.empty_caption, f"{name} has no letter or digit", raw, synthetic)
    if gates.boilerplate not in ("fuse", "flag") and is_boilerplate(raw):
        return _route(Reason.BOILERPLATE, gates.boilerplate, f"raw is {_show(raw)}", raw, synthetic)
    if gates.mismatched_pair not in ("fuse", "flag") and not shared_content(source_words(raw), source_words(synthetic)):
        detail = "raw and synthetic share no content word"
        return _route(Reason.MISMATCHED_PAIR, gates.mismatched_pair, detail, raw, synthetic)
    return None


def kept_text(raw: str | None, synthetic: str | None, reason: Reason, gates: GatesConfig) -> str:
    """The caption of a KEPT row."""
    text = raw if getattr(gates, reason) == "keep_raw" else synthetic
    return (text or "").strip()


def _says(text: str | None) -> bool:
    return text is not None and any(map(str.isalnum, text))


def _route(reason: Reason, policy: str, detail: str, raw: str | None, synthetic: str | None) -> Verdict:
    wanted = {"keep_raw": raw, "keep_synthetic": synthetic}.get(policy)
    keep = _says(wanted) and not (reason == Reason.BOILERPLATE and is_boilerplate(wanted or ""))
    return Verdict(Outcome.KEPT if keep else Outcome.REJECTED, reason, _clip(detail))


# ------------------------------------------------------------------------------------------------ after the engine

_ECHO_HINTS = ("sentence", "real-world", "real world", "in-depth", "well-structured", "false ", "grammar", "merge")
# 2 points: talk about the task. No caption of a picture says this.
_ECHO_TASK = re.compile(
    r"\bsentences? ?(?:structures?\b|[12]\b|one\b|two\b)|\b(?:first|second|two|both|new|given|combined|merged|refined) sentences?\b"
    r"|\bwell-structured sentence|\bthe sentence\b|^(?:new )?sentence:|\bflaws in\b|\bgrammar\b|\bsimply concatenat"
    r"|\bfalse (?:information|details?)\b|\black(?:s|ing|ed)? (?:of )?(?:in-depth|depth|detailed|real-world)"
    r"|\bmerge and refine|\brefined and merged|\bin-depth (?:real-world|details?|information|knowledge)"
)
# 1 point: a phrase of the instruction that became a phrase of the caption.
_ECHO_PHRASE = re.compile(
    r"\bdetailed (?:and \w+ )?(?:real-world|knowledge)\b"
    r"|\breal-world (?:knowledge|details?|information|scenario|setting|view|product|item|representation|model|data)\b"
    r"|\bwell-structured and detailed\b|\bdetailed and well-structured\b|\bin the real world\b|\bwell-structured\b"
)


def instruction_echo(t: Triple) -> Fault | None:
    """Points for distinct phrases of the instruction that neither source brought in."""
    low = t.fused.text.lower()
    for hint in _ECHO_HINTS:
        if hint in low:
            break
    else:
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
    """1 where the engine wrote no word."""
    return None if t.fused.words else Fault(1.0, f"{len(t.fused.text)} characters, no word")


_SENTENCE_END = re.compile(r"[.!?…。！？｡।؟][\"'”’»)\]」』）*]*$")


def cut_off(t: Triple) -> Fault | None:
    """1 where the engine stopped at max_new_tokens; unknown finish: where the caption ends in no full stop."""
    if t.finish is FinishReason.EOS:
        return None
    if t.finish is FinishReason.LENGTH:
        return Fault(1.0, f"no end of text at max_new_tokens, ends {_show(t.fused.text[-30:])}")
    if _SENTENCE_END.search(t.fused.text[-12:]):
        return None
    return Fault(1.0, f"no full stop, ends {_show(t.fused.text[-30:])}")


def _fourgrams(keys: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(keys, keys[1:], keys[2:], keys[3:], strict=False))


def repetition(t: Triple) -> Fault | None:
    """Share of the 4-grams that stood in the caption before, beyond what a source repeats itself."""
    grams = _fourgrams(t.fused.keys)
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
    """Share of the words that are both sources pasted verbatim, apart from glue between them."""
    raw, synthetic, fused = t.raw.keys, t.synthetic.keys, t.fused.keys
    if len(raw) < 3 or len(synthetic) < 3 or len(fused) < len(raw) + len(synthetic):
        return None
    line = _sequence(fused)
    if _sequence(synthetic) not in line or _sequence(raw) not in line:
        return None
    share = (len(raw) + len(synthetic)) / len(fused)
    return Fault(share, f"both sources verbatim make {share:.0%} of it")


def copy_of_one(t: Triple) -> Fault | None:
    """Share of the words that are one source verbatim, where the other had something to add and nothing of it came."""
    fused = t.fused.keys
    for name, source, other in (("raw", t.raw, t.synthetic), ("synthetic", t.synthetic, t.raw)):
        size = len(source.keys)
        if size < 2 or not 0.8 * size <= len(fused) <= 1.25 * size:
            continue
        grams = set(zip(source.keys, source.keys[1:], strict=False))
        share = sum(map(grams.__contains__, pairwise(fused))) / max(len(fused) - 1, 1)
        if share >= 0.5 and not (other.held - source.held - STOP_KEYS) & t.fused.held:
            if other.held - source.held - STOP_KEYS:
                return Fault(share, f"{share:.0%} of its word pairs are {name}'s, nothing is the other's")
    return None


def unsupported_number(t: Triple) -> Fault | None:
    """How many numbers, written in digits, are in neither source."""
    found = t.fused.numbers()
    if not found:
        return None
    missing = [n for n in found if n not in t.raw.held and n not in t.synthetic.held]
    if not missing:
        return None
    sources = [*t.raw.numbers(), *t.synthetic.numbers()]
    missing = [n for n in dict.fromkeys(missing) if not _number_held(n, sources)]
    if not missing:
        return None
    return Fault(len(missing), _neither(missing))


def _number_held(number: str, sources: Sequence[str]) -> bool:
    for other in sources:
        if number == other or (len(number) > 1 and len(other) > 4 and number in other):  # 20160502 -> 2016
            return True
        if len(number) == 4 and len(other) == 2 and number.endswith(other) and number[:2] in ("19", "20"):  # '95
            return True
    return False


def _neither(values: Sequence[str]) -> str:
    shown = ", ".join(_show(v) for v in values[:4])
    return f"{shown}{' and more' if len(values) > 4 else ''} {'is' if len(values) == 1 else 'are'} in neither source"


def unsupported_name(t: Triple) -> Fault | None:
    """How many capitalised words inside a sentence are in neither source."""
    missing = [w for w in t.unheld() if w[0].isupper()]
    if not missing:
        return None
    return Fault(len(missing), _neither(missing))


def lost_entity(t: Triple) -> Fault | None:
    """Share of raw's names and numbers that the caption does not mention."""
    return None


def wrong_script(t: Triple) -> Fault | None:
    """Share of the letters that are of a script no source uses; 1 where the language is neither source's."""
    return None


def too_short(t: Triple) -> Fault | None:
    """Words of the longer source per fused word; a caption of one word counts as none."""
    fused = len(t.fused.keys)
    source = max(len(t.raw.keys), len(t.synthetic.keys))
    return Fault(source / max(fused, 1), f"{fused} words from {source}")


def too_long(t: Triple) -> Fault | None:
    """Fused words per word of both sources together."""
    fused = len(t.fused.keys)
    source = len(t.raw.keys) + len(t.synthetic.keys)
    return Fault(fused / max(source, 1), f"{fused} words from {source}")


GATES: tuple[tuple[Reason, Callable[[Triple], Fault | None]], ...] = (
    (Reason.EMPTY_OUTPUT, empty_output),
    (Reason.INSTRUCTION_ECHO, instruction_echo),
    (Reason.REPETITION, repetition),
    (Reason.WRONG_SCRIPT, wrong_script),
    (Reason.CONCATENATION, concatenation),
    (Reason.COPY_OF_ONE, copy_of_one),
    (Reason.UNSUPPORTED_NUMBER, unsupported_number),
    (Reason.UNSUPPORTED_NAME, unsupported_name),
    (Reason.CUT_OFF, cut_off),
    (Reason.LOST_ENTITY, lost_entity),
    (Reason.TOO_SHORT, too_short),
    (Reason.TOO_LONG, too_long),
)


def judge(pair: CaptionPair, generation: Generation, gates: GatesConfig) -> Verdict:
    """The verdict on what an engine wrote for a pair."""
    if generation.finish is FinishReason.ERROR:
        return Verdict(Outcome.REJECTED, Reason.ENGINE_ROW_ERROR, _clip(generation.error or "the engine gave no error"))
    return judge_text(pair.raw, pair.synthetic, generation.text, generation.finish, gates)


def judge_text(raw: str, synthetic: str, fused: str, finish: FinishReason | None, gates: GatesConfig) -> Verdict:
    """`judge` for bare captions; finish None: unknown."""
    return _judge(Triple(raw, synthetic, fused.strip(), finish), gates)


def _judge(t: Triple, gates: GatesConfig) -> Verdict:
    reason: Reason | None = None
    detail = ""
    flags: list[Reason] = []
    if gates.boilerplate == "flag" and is_boilerplate(t.raw.text):
        flags.append(Reason.BOILERPLATE)
    if gates.mismatched_pair == "flag" and not shared_content(t.raw, t.synthetic):
        flags.append(Reason.MISMATCHED_PAIR)
    for name, gate in GATES:
        rule: GateConfig = getattr(gates, name)
        if rule.action == "ignore":
            continue
        fault = gate(t)
        if fault is None:
            continue
        if fault.size >= rule.threshold:
            if rule.action == "reject" and reason is None:
                reason, detail = name, fault.detail
                if name is Reason.EMPTY_OUTPUT:
                    break  # nothing is left to measure
            else:
                flags.append(name)
        elif rule.flag_from is not None and fault.size >= rule.flag_from:
            flags.append(name)
    if reason is None:
        return Verdict(Outcome.FUSED, None, "", tuple(flags))
    return Verdict(Outcome.REJECTED, reason, _clip(detail), tuple(flags))


def judge_table(
    raw: Sequence[str],
    synthetic: Sequence[str],
    fused: Sequence[str],
    gates: GatesConfig,
    finish: Iterable[FinishReason | None] | None = None,
) -> list[Verdict]:
    """`judge_text` for columns of equal length; finish None: unknown for all rows."""
    finishes = [None] * len(fused) if finish is None else list(finish)
    rows = zip(raw, synthetic, fused, finishes, strict=True)
    return [judge_text(r, s, f, end, gates) for r, s, f, end in rows]


def _show(text: str) -> str:
    return f"'{text if len(text) <= 60 else text[:57] + '…'}'"


def _clip(detail: str) -> str:
    """On one line and short; lone surrogates replaced, because the detail is stored as UTF-8."""
    detail = _SURROGATE.sub("\ufffd", " ".join(detail.split()))
    return detail if len(detail) < MAX_DETAIL else detail[: MAX_DETAIL - 2] + "…"
