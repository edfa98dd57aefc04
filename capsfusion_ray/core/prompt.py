"""The prompt: template, token budget, truncation, and where the constant prefix ends.

Pure: knows no model and no tokenizer, only an `encode` function from texts to token ids.
The template is an interface of the model: CapsFus-LLaMA was trained on this text to the letter
(baaivision/CapsFusion, arXiv 2310.20550), so a model folder may carry its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from capsfusion_ray.core.types import CaptionPair, Prompt
from capsfusion_ray.errors import ConfigError, RowError

Encode = Callable[[Sequence[str]], list[list[int]]]

TEMPLATE = (
    "Please merge and refine the information from the two given sentences. Sentence 1 provides detailed real-world "
    "knowledge, yet it suffers from flaws in sentence structure and grammar. Sentence 2 exhibits nice sentence "
    "structure, but lacking in-depth real-world details and may contain false information. Please combine them into a "
    "new sentence, ensuring a well-structured sentence while retaining the detailed real-world information provided in "
    "Sentence 1. Avoid simply concatenating the sentences.\n\n"
    "Sentence 1: {raw}\nSentence 2: {synthetic}\nNew Sentence:"
)

# No tokenizer of the supported models spends fewer than one token on this many characters of running text; a 1 MB alt
# text is cut to budget * this before it is tokenised at all.
MAX_CHARS_PER_TOKEN = 64


@dataclass(frozen=True)
class Template:
    """A prompt template split at its two fields."""

    before_raw: str
    between: str
    after_synthetic: str

    @classmethod
    def parse(cls, text: str) -> Template:
        """Raises ConfigError unless `{raw}` and then `{synthetic}` each stand in the text exactly once."""
        if (
            text.count("{raw}") != 1
            or text.count("{synthetic}") != 1
            or text.index("{raw}") > text.index("{synthetic}")
        ):
            raise ConfigError(
                f"prompt template {text[:60]!r}…: needs {{raw}} and then {{synthetic}}, each exactly once; fix the template"
            )
        before, rest = text.split("{raw}")
        between, after = rest.split("{synthetic}")
        return cls(before, between, after)

    def render(self, raw: str, synthetic: str) -> str:
        return f"{self.before_raw}{raw}{self.between}{synthetic}{self.after_synthetic}"


def _common_prefix(ids: Sequence[Sequence[int]]) -> tuple[int, ...]:
    shortest = min(ids, key=len)
    n = 0
    while n < len(shortest) and all(other[n] == shortest[n] for other in ids):
        n += 1
    return tuple(shortest[:n])


# What may follow the constant text: letters, digits, punctuation, space-less scripts, an emoji, nothing. A tokenizer
# whose merges reach over the seam gives these different ids at the seam, and the common prefix ends before it.
_SEAM_PROBES = ("a", "The", "1", "2024", "-", "'s", ".", "é", "中文", "日", "ü", "🙂", '"', "(", "#", "s", "")


class PromptBuilder:
    """Builds prompts that fit the token budget: raw words are cut first, then synthetic ones, never the instruction.

    `encode` is an engine's: texts -> token ids, BOS included. For an engine without a tokenizer it gives empty lists,
    and prompts are built from text alone.
    """

    def __init__(self, template: str, encode: Encode, max_prompt_tokens: int) -> None:
        self.template = Template.parse(template)
        self._encode = encode
        self._max_tokens = max_prompt_tokens
        probes = encode([self.template.render(probe, "A photo.") for probe in _SEAM_PROBES])
        self.prefix_ids = _common_prefix(probes)
        # At least one suffix token is needed to ask the model for the first new one.
        self.has_tokens = bool(self.prefix_ids)
        floor = len(encode([self.template.render("", "")])[0])
        if floor >= max_prompt_tokens:
            raise ConfigError(
                f"engine.max_prompt_tokens={max_prompt_tokens}: the prompt without captions already has {floor} tokens; "
                f"give at least {floor + 32}"
            )

    def build(self, pairs: Sequence[CaptionPair]) -> list[Prompt | RowError]:
        """One prompt a pair, in order; a RowError in the place of a pair that no truncation fits."""
        limit = self._max_tokens * MAX_CHARS_PER_TOKEN
        sides = [(pair.raw.strip()[:limit], pair.synthetic.strip()[:limit]) for pair in pairs]
        texts = [self.template.render(raw, synthetic) for raw, synthetic in sides]
        all_ids = self._encode(texts)
        built: list[Prompt | RowError] = []
        for pair, (raw, synthetic), text, ids in zip(pairs, sides, texts, all_ids, strict=True):
            if len(ids) > self._max_tokens:
                try:
                    raw, synthetic, text, ids = self._truncate(pair.row_id, raw, synthetic)
                except RowError as error:
                    built.append(error)
                    continue
            n_prefix = len(self.prefix_ids)
            if tuple(ids[:n_prefix]) == self.prefix_ids and len(ids) > n_prefix:
                prefix, suffix = self.prefix_ids, tuple(ids[n_prefix:])
            elif not ids:
                prefix, suffix = (), ()
            else:
                built.append(
                    RowError(f"{pair.row_id}: the tokenizer merged the caption into the instruction; row rejected")
                )
                continue
            built.append(Prompt(pair.row_id, text, raw, synthetic, prefix, suffix))
        return built

    def _truncate(self, row_id: str, raw: str, synthetic: str) -> tuple[str, str, str, list[int]]:
        """The longest raw caption that fits; if none does, the longest synthetic one beside an empty raw caption.

        The reference cuts token ids and loses the whole raw caption at exactly 256 tokens (`ids[:-0]`), or the cue.
        Cutting the text and encoding again keeps the prompt's own tokenisation, at about 12 encodings of a rare row.
        """

        for render in (lambda cut: (cut, synthetic), lambda cut: ("", cut)):
            whole = raw if render("x")[0] else synthetic
            low, high = 0, len(whole)  # characters; the longest length that fits lies in [low, high], if any fits
            best: tuple[str, str, str, list[int]] | None = None
            while low <= high:
                middle = (low + high) // 2
                a, b = render(whole[:middle].rstrip())
                text = self.template.render(a, b)
                ids = self._encode([text])[0]
                if len(ids) <= self._max_tokens:
                    best, low = (a, b, text, ids), middle + 1
                else:
                    high = middle - 1
            if best is not None:
                return best
        raise RowError(f"{row_id}: no truncation fits the prompt into {self._max_tokens} tokens")
