"""Judge a caption pair before the engine: is a caption missing, is the raw one boilerplate, do the two match?"""

from __future__ import annotations

import re

from capsfusion_ray.config import GatesConfig
from capsfusion_ray.core.gates.triple import MAX_READ, SURROGATE, clip, quoted
from capsfusion_ray.core.gates.words import BOILERPLATE_KEYS, STOP_KEYS
from capsfusion_ray.core.types import CaptionPair, Outcome, Reason, Verdict
from capsfusion_ray.core.word_keys import Words, key_of, source_words

_HASHED = re.compile(
    r"(?=(?:[a-z]*\d+[a-z]+){2})[a-z0-9]{6,}|(?=.*\d)[0-9a-f]{8,}", re.IGNORECASE
)  # B07KX9YQ2L, 5f3a9c2e


_HOST = re.compile(r"https?://[^/\s]+")
_WORD = re.compile(r"[^\W_]+")


def is_boilerplate(text: str) -> bool:
    """Whether an alt text says nothing about the picture: 'image', 'IMG_1234.jpg', 'Click to enlarge', a number."""
    if len(text) > 300:
        return False
    words = (
        _HOST.sub(" ", text) if "://" in text else text
    )  # the name of a host describes nothing; the words of a path may
    for match in _WORD.finditer(words):  # usually the first word has content, so that the loop ends early
        word = match[0]
        if key_of(word) in BOILERPLATE_KEYS or word.isdecimal():
            continue
        if word.isalpha():
            return False
        if _HASHED.fullmatch(word):
            continue
        letters = word.rstrip("0123456789").lower()
        if letters != word.lower() and key_of(letters) in BOILERPLATE_KEYS:  # img20160502, dsc00012
            continue
        return False
    return True


def shared_content(raw: Words, synthetic: Words) -> set[str]:
    """Keys of the content words that both sources have."""
    return (raw.held & synthetic.held) - STOP_KEYS


def judge_pair(pair: CaptionPair, gates: GatesConfig) -> Verdict | None:
    """The verdict on a pair that is not fused; None: fuse it. A caption is None if its column is null."""
    return judge_sources(pair.raw, pair.synthetic, gates)


def judge_sources(raw: str | None, synthetic: str | None, gates: GatesConfig) -> Verdict | None:
    """`judge_pair` for two captions."""
    if raw is None or synthetic is None:
        name = "both captions" if raw is None and synthetic is None else "raw" if raw is None else "synthetic"
        return _route(Reason.NULL_CAPTION, gates.null_caption, f"{name} null", raw, synthetic)
    for name, text in (("raw", raw), ("synthetic", synthetic)):
        if not text.isascii() and (found := SURROGATE.search(text)):
            return Verdict(Outcome.REJECTED, Reason.INVALID_UTF8, f"{name} has a lone surrogate at {found.start()}")
    if not _says(raw) or not _says(synthetic):
        name = "raw" if not _says(raw) else "synthetic"
        return _route(Reason.EMPTY_CAPTION, gates.empty_caption, f"{name} has no letter or digit", raw, synthetic)
    if gates.boilerplate not in ("fuse", "flag") and is_boilerplate(raw):
        return _route(Reason.BOILERPLATE, gates.boilerplate, f"raw is {quoted(raw)}", raw, synthetic)
    if gates.mismatched_pair not in ("fuse", "flag") and not shared_content(
        source_words(raw[:MAX_READ]), source_words(synthetic[:MAX_READ])
    ):
        detail = "raw and synthetic share no content word"
        return _route(Reason.MISMATCHED_PAIR, gates.mismatched_pair, detail, raw, synthetic)
    return None


def kept_text(raw: str | None, synthetic: str | None, reason: Reason, gates: GatesConfig) -> str:
    """The caption of a KEPT row."""
    text = raw if getattr(gates, reason) == "keep_raw" else synthetic
    return (text or "").strip()


def _says(text: str | None) -> bool:
    """Whether the text has a letter or a digit."""
    return text is not None and any(map(str.isalnum, text))


def _route(reason: Reason, policy: str, detail: str, raw: str | None, synthetic: str | None) -> Verdict:
    """KEPT if the policy names a caption that says something, else REJECTED."""
    wanted = {"keep_raw": raw, "keep_synthetic": synthetic}.get(policy)
    keep = _says(wanted) and not (reason == Reason.BOILERPLATE and is_boilerplate(wanted or ""))
    return Verdict(Outcome.KEPT if keep else Outcome.REJECTED, reason, clip(detail))
