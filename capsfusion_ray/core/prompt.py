"""Build prompts: fill the template, keep to the token budget, and find where the constant prefix ends.

Pure: knows no model and no tokenizer, only an `encode` function from texts to token ids. TEMPLATE is the text that CapsFus-LLaMA
was trained on, character by character (baaivision/CapsFusion, arXiv 2310.20550); a model folder may have its own.
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

# Every supported tokenizer makes at least one token of this many characters of text. An alt text of 1 MB is cut to the token budget
# times this before it is tokenised.
MAX_CHARS_PER_TOKEN = 64


@dataclass(frozen=True)
class Template:
    """A prompt template, split at its two fields."""

    before_raw: str
    between: str
    after_synthetic: str

    @classmethod
    def parse(cls, text: str) -> Template:
        """The template of `text`. Raises ConfigError unless it has `{raw}` and then `{synthetic}`, each exactly once."""
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
        """The prompt for two captions."""
        return f"{self.before_raw}{raw}{self.between}{synthetic}{self.after_synthetic}"


def _common_prefix(ids: Sequence[Sequence[int]]) -> tuple[int, ...]:
    shortest = min(ids, key=len)
    n = 0
    while n < len(shortest) and all(other[n] == shortest[n] for other in ids):
        n += 1
    return tuple(shortest[:n])


# Beginnings of a raw caption: letters, digits, punctuation, scripts without spaces, an emoji, nothing. If a tokenizer merges the end
# of the constant text with them, their ids differ there, and the common prefix ends before the merge.
_SEAM_PROBES = ("a", "The", "1", "2024", "-", "'s", ".", "é", "中文", "日", "ü", "🙂", '"', "(", "#", "s", "")


class PromptBuilder:
    """Builds prompts that fit the token budget. It cuts the raw caption first, then the synthetic one, and never the instruction.

    `encode` comes from the engine: texts -> token ids, including BOS. For an engine without a tokenizer it returns empty lists,
    and the prompts have text only.
    """

    def __init__(self, template: str, encode: Encode, max_prompt_tokens: int) -> None:
        self.template = Template.parse(template)
        self._encode = encode
        self._max_tokens = max_prompt_tokens
        probes = encode([self.template.render(probe, "A photo.") for probe in _SEAM_PROBES])
        self.prefix_ids = _common_prefix(probes)
        floor = len(encode([self.template.render("", "")])[0])
        if floor >= max_prompt_tokens:
            raise ConfigError(
                f"engine.max_prompt_tokens={max_prompt_tokens}: the prompt without captions already has {floor} tokens; "
                f"give at least {floor + 32}"
            )

    def build(self, pairs: Sequence[CaptionPair]) -> list[Prompt | RowError]:
        """One prompt per pair, in order; a RowError in place of a pair that does not fit even when cut."""
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
            n_prefix = len(
                self.prefix_ids
            )  # one suffix token at least must follow: the model is asked with it for the first new one
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
        """Cut the raw caption to the longest text that fits; if none fits, leave it out and cut the synthetic one.

        Returns raw, synthetic, text and ids. The reference cuts token ids: at exactly 256 tokens it loses the whole raw caption
        (`ids[:-0]`), at others the end of the prompt. Here the text is cut and encoded again, so that the tokens are those of
        the shorter prompt; this takes about 12 encodings of a rare row.
        """

        for render in (lambda cut: (cut, synthetic), lambda cut: ("", cut)):
            whole = raw if render("x")[0] else synthetic
            low, high = 0, len(whole)  # in characters; the longest length that fits, if any, is in [low, high]
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
