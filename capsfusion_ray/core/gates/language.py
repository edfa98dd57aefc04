"""The gate for a caption in a script or a language of neither source."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter

from capsfusion_ray.core.gates.triple import Fault, Triple
from capsfusion_ray.core.word_keys import key_of

# First code point of a block -> script; Han and kana are one, because Japanese mixes them.
_BLOCKS = (
    (0x0, "Latin"),
    (0x370, "Greek"),
    (0x400, "Cyrillic"),
    (0x530, "Armenian"),
    (0x590, "Hebrew"),
    (0x600, "Arabic"),
    (0x780, "other"),
    (0x900, "Indic"),
    (0xE00, "Thai"),
    (0xE80, "other"),
    (0x10A0, "Georgian"),
    (0x1100, "Hangul"),
    (0x1200, "other"),
    (0x1E00, "Latin"),
    (0x1F00, "Greek"),
    (0x2000, "Latin"),
    (0x2C00, "other"),
    (0x2E80, "Han"),
    (0x3130, "Hangul"),
    (0x3190, "Han"),
    (0xA000, "other"),
    (0xAC00, "Hangul"),
    (0xD800, "other"),
    (0xF900, "Han"),
    (0xFB00, "Latin"),
    (0xFB1D, "Hebrew"),
    (0xFB50, "Arabic"),
    (0xFE00, "other"),
    (0xFE70, "Arabic"),
    (0xFF00, "Latin"),
    (0xFF66, "Han"),
    (0xFFA0, "Hangul"),
    (0xFFE0, "other"),
    (0x1D400, "Latin"),
    (0x1D800, "other"),
    (0x20000, "Han"),
)
_STARTS = [start for start, _ in _BLOCKS]


def _scripts(text: str) -> Counter[str]:
    """Letters by script; the replacement character U+FFFD is a script of its own."""
    chars = Counter(text)
    out: Counter[str] = Counter()
    for char, n in chars.items():
        if char == "\ufffd":
            out["damaged"] += n
        elif char.isalpha():
            out[_BLOCKS[bisect_right(_STARTS, ord(char)) - 1][1]] += n
    return out


# Function words that are not used in the other languages of this table.
_FUNCTION = {
    "English": "the of and with is are this that from for which by at it its has been",
    "Spanish": "el los las con por para una del es muy y que",
    "French": "le les des et avec dans pour une est sur aux du qui",
    "German": "der das und mit ein eine ist für auf dem den von im",
    "Italian": "il della di gli che sono nel una con per degli dei",
    "Portuguese": "os um uma com para em não são do da ao",
    "Dutch": "het een van op voor met zijn de en deze",
}
_FUNCTION_KEYS = {name: frozenset(map(key_of, words.split())) for name, words in _FUNCTION.items()}
_ENGLISH = _FUNCTION_KEYS["English"]
_ANY_FUNCTION = frozenset().union(*_FUNCTION_KEYS.values())


def wrong_script(t: Triple) -> Fault | None:
    """Share of the letters in a script that no source uses; 1 if the language is that of neither source."""
    fused, raw, synthetic = t.fused.text, t.raw.text, t.synthetic.text
    if not (fused.isascii() and (synthetic.isascii() or raw.isascii())):
        have = _scripts(fused)
        known = _scripts(raw).keys() | _scripts(synthetic).keys()
        foreign = {script: n for script, n in have.items() if script not in known}
        if foreign and known:
            share = sum(foreign.values()) / sum(have.values())
            return Fault(
                share, f"{share:.0%} of the letters are {max(foreign, key=lambda s: foreign[s])}, in neither source"
            )
    if len(t.fused.held & _ENGLISH) > 1 and not t.synthetic.held.isdisjoint(_ENGLISH):
        return None
    return _wrong_language(t)


def _wrong_language(t: Triple) -> Fault | None:
    if len(t.fused.held & _ANY_FUNCTION) < 3:
        return None
    hits = {name: len(t.fused.held & keys) for name, keys in _FUNCTION_KEYS.items()}
    ranked = sorted(hits, key=lambda name: -hits[name])
    best = ranked[0]
    if hits[best] < 3 or hits[best] < 2 * hits[ranked[1]]:
        return None
    sources = t.raw.held | t.synthetic.held
    if sources & _FUNCTION_KEYS[best] or len(sources) < 6:
        return None
    if (
        best == "English"
        and max(len(t.synthetic.held & keys) for name, keys in _FUNCTION_KEYS.items() if name != "English") < 2
    ):
        return None  # a captioner writes English unless its caption shows another language; the language of the raw caption is free
    return Fault(1.0, f"written in {best}, which neither source is")
