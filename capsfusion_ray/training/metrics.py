"""Measure fused captions against references (BLEU-4, chrF, ROUGE-L, CIDEr) and against their own sources. Pure.

BLEU-4 and chrF come from sacrebleu. No maintained library computes the other two without Java, so they are here:

ROUGE-L is the F1 score of the longest common subsequence of words in lower case, averaged over captions.

CIDEr is CIDEr-D (Vedantam et al., 2015) as in pycocoevalcap. For n = 1 to 4 it takes the TF-IDF vectors of the n-grams of
candidate and reference. Document frequencies are counted over the references, and the candidate's counts are clipped to
those of the reference. The cosine similarity is multiplied by exp(-(difference of lengths)^2 / (2 * 6^2)), averaged over
n, and multiplied by 10. With one reference per caption the references themselves score 10. One thing differs from the
original: words are runs of letters and digits in lower case, without the PTB tokenizer (Java).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from capsfusion_ray.config.extras import imports_of

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_NUMBER = re.compile(r"\d+")
_CAPITALISED = re.compile(r"(?<![^\W_])[A-Z][^\W_]*")
_GOOD_ENDING = re.compile(r"""[.!?…]["'”’)\]]*$""")
_CIDER_N, _CIDER_SIGMA = 4, 6.0
PASTED = 0.9  # from this share of both sources' words, in order, on a caption counts as a concatenation of its sources
# Words whose presence says nothing about where a caption's content came from.
_FUNCTION_TEXT = """
a an the this that these those of in on at to for from by with without and or but nor so as is are was were be been being
am it its he she they them his her their our your my we you i who whom whose which what when where while how why during
into onto over under between among through near up down out off about after before against above below not no yes has have
had having do does did can could will would shall should may might must there here than then also such both either each
every some any all more most other another same very just only own too if because until s t
"""
_FUNCTION_WORDS = frozenset(_FUNCTION_TEXT.split())

_Gram = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A caption to measure, its two sources, and the caption that a better model wrote (the reference)."""

    raw: str
    synthetic: str
    fused: str
    reference: str


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def measure(examples: Sequence[Example]) -> dict[str, float]:
    """Compute all figures of one system. Shares and scores are in [0, 1], CIDEr in [0, 10]; words is a mean number."""
    with imports_of("evaluate"):
        from sacrebleu.metrics import BLEU, CHRF

    fused, references = [e.fused for e in examples], [e.reference for e in examples]
    tokens, reference_tokens = [words_of(f) for f in fused], [words_of(r) for r in references]
    return {
        "rouge_l": _mean(rouge_l(t, r) for t, r in zip(tokens, reference_tokens, strict=True)),
        "bleu_4": BLEU(lowercase=True).corpus_score(fused, [references]).score / 100,
        "chrf": CHRF().corpus_score(fused, [references]).score / 100,
        "cider": cider(tokens, reference_tokens),
        "numbers_kept": _kept(_NUMBER.findall, examples, fold=False),
        "capitalised_kept": _kept(_CAPITALISED.findall, examples, fold=True),
        "content_in_neither": _in_neither(examples),
        "numbers_in_neither": _mean(
            bool(set(_NUMBER.findall(e.fused)) - set(_NUMBER.findall(f"{e.raw} {e.synthetic}"))) for e in examples
        ),
        "good_ending": _mean(has_good_ending(e.fused) for e in examples),
        "repeated_trigram": _mean(has_repeated_trigram(t) for t in tokens),
        "near_concatenation": _mean(is_near_concatenation(e) for e in examples),
        "pasted": _mean(
            concatenated_share(e) >= PASTED for e in examples
        ),  # as near_concatenation, for captions of any length
        "instruction_echo": _mean(bool(_ECHO.search(e.fused)) for e in examples),
        "words": _mean(len(t) for t in tokens),
    }


_ECHO = re.compile(
    r"real[- ]world (?:knowledge|information|detail)|\bsentences? [12]\b|(?:two|given) sentences\b|sentence structure",
    re.IGNORECASE,
)


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(candidate: Sequence[str], reference: Sequence[str]) -> float:
    if not candidate or not reference:
        return 0.0
    common = lcs_length(candidate, reference)
    return 2 * common / (len(candidate) + len(reference))


class Cider:
    """CIDEr-D of one caption against one reference. Document frequencies are counted once, over `corpus`."""

    def __init__(self, corpus: Iterable[Sequence[str]]) -> None:
        self._frequency: Counter[_Gram] = Counter()
        captions = 0
        for words in corpus:
            self._frequency.update(_ngrams(words).keys())
            captions += 1
        self._log_captions = math.log(max(2, captions))

    def _idf(self, gram: _Gram) -> float:
        return self._log_captions - math.log(max(1, self._frequency[gram]))

    def score(self, candidate: Sequence[str], reference: Sequence[str]) -> float:
        """Return CIDEr-D, 0 to 10."""
        counts, reference_counts = _ngrams(candidate), _ngrams(reference)
        dot, squares, reference_squares = [0.0] * _CIDER_N, [0.0] * _CIDER_N, [0.0] * _CIDER_N
        for gram, n in counts.items():
            weight = self._idf(gram)
            squares[len(gram) - 1] += (n * weight) ** 2
            dot[len(gram) - 1] += min(n, reference_counts[gram]) * reference_counts[gram] * weight**2
        for gram, n in reference_counts.items():
            reference_squares[len(gram) - 1] += (n * self._idf(gram)) ** 2
        penalty = math.exp(-((len(candidate) - len(reference)) ** 2) / (2 * _CIDER_SIGMA**2))
        cosines = [
            d / math.sqrt(s * r) if s > 0 and r > 0 else 0.0
            for d, s, r in zip(dot, squares, reference_squares, strict=True)
        ]
        return 10 * penalty * sum(cosines) / _CIDER_N


def cider(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float:
    """Return the mean CIDEr-D of the captions, each with one reference. The module's docstring has the formula."""
    scorer = Cider(references)
    return _mean(scorer.score(c, r) for c, r in zip(candidates, references, strict=True))


def _ngrams(words: Sequence[str]) -> Counter[_Gram]:
    return Counter(tuple(words[i : i + n]) for n in range(1, _CIDER_N + 1) for i in range(len(words) - n + 1))


def has_repeated_trigram(words: Sequence[str]) -> bool:
    trigrams = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return len(set(trigrams)) < len(trigrams)


def is_near_concatenation(example: Example) -> bool:
    """Return whether the caption is both sources almost word for word, one after the other, with little else.

    A caption of more than 1.25 times as many words as its sources is never one, because it adds enough of its own. A
    model that is trained against this figure learns to add filler instead; `pasted` in `measure` also counts those.
    """
    n = len(words_of(example.raw)) + len(words_of(example.synthetic))
    return len(words_of(example.fused)) <= 1.25 * n and concatenated_share(example) >= PASTED


def concatenated_share(example: Example) -> float:
    """Return the share of both sources' words that the fused caption contains in order, one source after the other.

    What else the caption contains does not matter. 0 if a source has fewer than 3 words.
    """
    fused = words_of(example.fused)
    raw, synthetic = words_of(example.raw), words_of(example.synthetic)
    if len(raw) < 3 or len(synthetic) < 3:
        return 0.0
    return max(lcs_length(fused, raw + synthetic), lcs_length(fused, synthetic + raw)) / (len(raw) + len(synthetic))


def _kept(find: Callable[[str], list[str]], examples: Sequence[Example], fold: bool) -> float:
    """Return the share of what `find` finds in the raw captions that the fused captions contain, too.

    Counts distinct words per caption, over all captions. `fold` compares in lower case.
    """
    counts = [_kept_of(find, e, fold) for e in examples]
    return sum(kept for kept, _ in counts) / max(1, sum(there for _, there in counts))


def _kept_of(find: Callable[[str], list[str]], e: Example, fold: bool) -> tuple[int, int]:
    """Return how many of the raw caption's distinct words are kept, and how many there are."""
    wanted = {w.lower() if fold else w for w in find(e.raw)}
    fused = set(words_of(e.fused)) | set(_NUMBER.findall(e.fused)) | set(re.findall(r"[^\W_]+", e.fused.lower()))
    return len(wanted & fused), len(wanted)


def lost_share(example: Example) -> float:
    """Return the share of the raw caption's numbers and capitalised words that the fused caption lacks; 0 if it has none."""
    numbers, capitalised = _kept_of(_NUMBER.findall, example, False), _kept_of(_CAPITALISED.findall, example, True)
    there = numbers[1] + capitalised[1]
    return (there - numbers[0] - capitalised[0]) / max(1, there)


def has_good_ending(text: str) -> bool:
    return bool(_GOOD_ENDING.search(text.strip()))


def unsupported_share(example: Example) -> float:
    """Return the share of the fused caption's content words that are in no source and not in the reference. Ignores endings."""
    content = _content(example.fused)
    return _absent(content, example.raw, example.synthetic, example.reference) / max(1, len(content))


def _in_neither(examples: Sequence[Example]) -> float:
    """Return the share of the fused captions' content words (distinct per caption) that are in no source. Ignores endings."""
    there = absent = 0
    for e in examples:
        content = _content(e.fused)
        there += len(content)
        absent += _absent(content, e.raw, e.synthetic)
    return absent / max(1, there)


def _absent(content: set[str], *texts: str) -> int:
    """Return how many of these words are in none of the texts, ignoring endings."""
    held = {_stem(w) for text in texts for w in words_of(text)}
    return sum(_stem(w) not in held for w in content)


def _content(text: str) -> set[str]:
    return {w for w in words_of(text) if w not in _FUNCTION_WORDS}


def _stem(word: str) -> str:
    for suffix in ("'s", "’s", "ing", "ed", "es", "s"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            return word[: -len(suffix)]
    return word


def _mean(values: Iterable[float]) -> float:
    held = [float(v) for v in values]
    return sum(held) / max(1, len(held))
