"""Rewrite triples so that the model learns to copy from its sources instead of memorising captions. Pure.

With 8,000 triples a small model memorises its training captions. Here a word that a source shares with the target is
replaced by another word in all three captions. Then only copying can predict it.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from capsfusion_ray.training.config import AugmentConfig
from capsfusion_ray.training.triples import Triple

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?|\d+")
# Words that are never replaced: grammar, and what captions say about the picture itself. Without them the rewritten
# sentences would be ungrammatical.
_KEPT_TEXT = """
a an the this that these those of in on at to for from by with without and or but as is are was were be been being it its
he his her their they she who which while where when during into onto over under between through near up down out off not
no has have had having can will may there one two three some many several all each other another also more most very such
than then so if your you we our us my i do does s t photo photograph picture image view featuring features feature
showcasing showcases shows show shown showing depicts depicted depicting captures captured displayed display includes
including titled called named made used using set available located standing sitting wearing holding
"""
_KEPT = frozenset(_KEPT_TEXT.split())
_SYLLABLE_TEXT = """
ba be bo bra cal car chi da del dor el en fa fer ga gor han hol ia in jo ka kel la len lo lu ma mar mi mon na nel no or pa
per qui ra ren ri ro sa sel shi son sta ta ter tho tor u va ven vi wa wen wy ya zan zo
"""
_SYLLABLES = tuple(_SYLLABLE_TEXT.split())
_SUFFIXES = ("ing", "ed", "ly", "s", "")  # a replacement with the same ending keeps the sentence grammatical


def words(text: str) -> list[str]:
    return _WORD.findall(text)


def _recase(word: str, like: str) -> str:
    if like.isupper() and len(like) > 1:
        return word.upper()
    return word[:1].upper() + word[1:] if like[:1].isupper() else word


def _class(word: str, is_name: bool) -> str:
    return "name" if is_name else next(suffix for suffix in _SUFFIXES if word.endswith(suffix))


@dataclass(frozen=True)
class Banks:
    """The replacements: names, other words by their ending, phrases, and whole captions."""

    by_class: dict[str, list[str]]  # lower case
    names: frozenset[str]  # lower case; words that fused captions usually write with a capital inside a sentence
    phrases: list[str]  # 1 to 7 words of raw captions, as they were written
    captions: list[str]  # raw and synthetic captions

    @classmethod
    def collect(cls, triples: Sequence[Triple], seed: int) -> Banks:
        rng = random.Random(f"banks-{seed}")
        capital: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for triple in triples:
            for match in list(_WORD.finditer(triple.fused))[1:]:
                total[match[0].lower()] += 1
                capital[match[0].lower()] += match[0][0].isupper()
        names = frozenset(word for word, n in total.items() if capital[word] * 2 > n)
        by_class: dict[str, list[str]] = {"name": [], **{suffix: [] for suffix in _SUFFIXES}}
        for word in sorted({w.lower() for t in triples for side in (t.raw, t.synthetic, t.fused) for w in words(side)}):
            if word not in _KEPT and not word.isdigit() and len(word) > 2:
                by_class[_class(word, word in names)].append(word)
        phrases = []
        for triple in triples:
            spans = list(_WORD.finditer(triple.raw))
            if len(spans) >= 2:
                length = rng.randint(1, min(7, len(spans)))
                start = rng.randrange(len(spans) - length + 1)
                phrases.append(triple.raw[spans[start].start() : spans[start + length - 1].end()])
        captions = [side for t in triples for side in (t.raw, t.synthetic)]
        return cls(by_class, names, phrases, captions)

    def stand_in(self, word: str, rng: random.Random) -> str:
        """Return another word, or number, of the same kind. `word` is in lower case."""
        if word.isdigit():
            if len(word) == 4 and word[:2] in ("19", "20") and rng.random() < 0.7:
                return str(rng.randint(1900, 2029))
            return str(rng.randint(1, 9)) + "".join(str(rng.randint(0, 9)) for _ in word[1:])
        return self.invented(rng) if rng.random() < 0.12 else self.word(_class(word, word in self.names), rng)

    def word(self, kind: str, rng: random.Random) -> str:
        """Return a word of `by_class[kind]`, or an invented one if the captions have no word of that kind."""
        known = self.by_class[kind]
        return rng.choice(known) if known else self.invented(rng)

    def invented(self, rng: random.Random) -> str:
        return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 4)))


def rewrite(triple: Triple, banks: Banks, cfg: AugmentConfig, rng: random.Random) -> Triple:
    """Replace phrases, names, numbers and words that a source shares with the target, consistently in all captions."""
    raw, synthetic, fused = triple.raw, triple.synthetic, triple.fused
    if rng.random() < cfg.phrase_share:
        raw, fused = _swap_phrase(raw, fused, banks, rng)
    if rng.random() < cfg.phrase_share / 2:
        synthetic, fused = _swap_phrase(synthetic, fused, banks, rng)
    in_target = {word.lower() for word in words(fused)}
    shared = [
        word for side in (raw, synthetic) for word in dict.fromkeys(w.lower() for w in words(side)) if word in in_target
    ]
    how_many = rng.choice((0.25, 0.5, 0.8, 1.0))
    replaced = {
        word: banks.stand_in(word, rng)
        for word in dict.fromkeys(shared)
        if (len(word) > 2 or word.isdigit()) and word not in _KEPT and rng.random() < how_many
    }
    # Words that only the raw caption has are sometimes replaced, too. Otherwise the model memorises which to leave out.
    for word in sorted({w.lower() for w in words(raw)} - in_target):
        if word not in _KEPT and rng.random() < 0.2 * how_many:
            replaced[word] = banks.stand_in(word, rng)

    def stand_in(match: re.Match[str]) -> str:
        other = replaced.get(match[0].lower())
        return match[0] if other is None else _recase(other, match[0])

    return Triple(_WORD.sub(stand_in, raw), _WORD.sub(stand_in, synthetic), _WORD.sub(stand_in, fused))


def _swap_phrase(source: str, fused: str, banks: Banks, rng: random.Random) -> tuple[str, str]:
    """Replace one run of two or more words that both captions contain by a phrase of another raw caption, in both."""
    spans = list(_WORD.finditer(source))
    lower = fused.lower()
    runs: list[tuple[int, int, int]] = []  # start and end in source, start in fused
    i = 0
    while i < len(spans) - 1:
        best = None
        for j in range(i + 1, len(spans)):
            at = lower.find(source[spans[i].start() : spans[j].end()].lower())
            if at < 0:
                break
            best = (j, at)
        if best is None:
            i += 1
        else:
            runs.append((spans[i].start(), spans[best[0]].end(), best[1]))
            i = best[0] + 1
    if not runs:
        return source, fused
    start, end, at = rng.choice(runs)
    length = end - start
    if len(lower) != len(fused):  # a letter whose small form is longer would shift the positions
        return source, fused
    phrase = rng.choice(banks.phrases)
    new_fused = fused[:at] + phrase + fused[at + length :]
    return source[:start] + phrase + source[end:], new_fused[:1].upper() + new_fused[1:]


def add_noise(triple: Triple, rng: random.Random) -> Triple:
    """Change the case of the raw caption or remove its punctuation, as in alt texts. The target stays."""
    kind = rng.randrange(4)
    if kind == 0:
        raw = triple.raw.title()
    elif kind == 1:
        raw = triple.raw.upper()
    elif kind == 2:
        raw = re.sub(r"[^\w\s'’&-]+", " ", triple.raw)
    else:
        raw = re.sub(r"\s+", "-", triple.raw)
    return Triple(raw.strip() or triple.raw, triple.synthetic, triple.fused)


def copy_task(banks: Banks, rng: random.Random) -> Triple:
    """Make a triple of random words, whose target joins pieces of both sides. Only copying can predict it."""
    sides = []
    for _ in range(2):
        if rng.random() < 0.3:
            sides.append(words(rng.choice(banks.captions))[:14] or ["photo"])
        else:
            n = rng.randint(3, 10)
            kinds = rng.choices(("name", "", "s", "ing", "7", "1999"), (4, 5, 1, 0.5, 0.6, 0.4), k=n)
            picked = [banks.stand_in(k, rng) if k.isdigit() else banks.word(k, rng) for k in kinds]
            sides.append([_recase(w, "A") if rng.random() < 0.4 else w for w in picked])
    pieces: list[list[str]] = []
    for side in sides:
        at = 0
        while at < len(side):
            length = rng.randint(2, 6)
            pieces.append(side[at : at + length])
            at += length
    rng.shuffle(pieces)
    target = ", ".join(" ".join(piece) for piece in pieces)
    return Triple(" ".join(sides[0]), " ".join(sides[1]), target + ".")


def draw(
    triples: Sequence[Triple],
    indices: Iterable[int],
    banks: Banks,
    cfg: AugmentConfig,
    copies: float,
    rng: random.Random,
) -> list[Triple]:
    """Return the triples at `indices`, rewritten. A share `copies` of them is replaced by copy tasks."""
    drawn = []
    for i in indices:
        if rng.random() < copies:
            drawn.append(copy_task(banks, rng))
            continue
        triple = triples[i]
        if rng.random() < cfg.rewrite_share:
            triple = rewrite(triple, banks, cfg, rng)
        if rng.random() < cfg.noise_share:
            triple = add_noise(triple, rng)
        drawn.append(triple)
    return drawn
