"""An engine without a model, to test the pipeline and its scale. Deterministic; it needs no torch and no tokenizer.

It composes a caption from both sources, about as long as a real one, so that all later stages work as with a model. Some
captions have one of the faults that the gates know, as often as the 8,000 published captions (docs/gates.md). The fault is
drawn from a hash of the two captions, so it is the same in each unit, run and process.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.core.types import FinishReason, Generation, Prompt
from capsfusion_ray.engines.base import Occupancy

# Words to which no gate reacts: they contain no name, no number and nothing about the task.
_PADDING = """and around it there are many other things to see that are not told about here because they are small or far away
or partly hidden behind larger ones while some light falls from above onto this scene and makes it look calm and quiet just as
one would expect on such a day with nothing else going on nearby and nobody walking past or standing still"""


class EchoEngine:
    """Implements engines.base.Engine."""

    def __init__(self, engine: EngineConfig, decode: DecodeConfig) -> None:
        self._max_words = decode.max_new_tokens
        self._queue: list[Prompt] = []
        self._words_around = 0  # words of the instruction, which all prompts share, so it is counted once

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[] for _ in texts]

    def submit(self, prompts: Sequence[Prompt]) -> None:
        self._queue.extend(prompts)

    @property
    def unfinished(self) -> int:
        return len(self._queue)

    @property
    def occupancy(self) -> Occupancy:
        return Occupancy(len(self._queue), len(self._queue))

    def step(self) -> list[Generation]:
        prompts, self._queue = self._queue, []
        if prompts and not self._words_around:
            self._words_around = _words(prompts[0].text) - _words(prompts[0].raw) - _words(prompts[0].synthetic)
        return [self._write(prompt) for prompt in prompts]

    def _write(self, prompt: Prompt) -> Generation:
        caption = write(prompt.raw, prompt.synthetic)
        words = caption.text.split()
        ended = caption.ended and len(words) <= self._max_words
        written = words[: self._max_words]
        # Token counts are counts of words, because there is no tokenizer.
        return Generation(
            prompt.id,
            " ".join(written),
            FinishReason.EOS if ended else FinishReason.LENGTH,
            self._words_around + _words(prompt.raw) + _words(prompt.synthetic),
            len(written),
        )


def _words(text: str) -> int:
    return len(text.split())


class Caption(NamedTuple):
    """A caption, and whether it ended before the limit of tokens."""

    text: str
    ended: bool = True


def write(raw: str, synthetic: str) -> Caption:
    """Return the caption of a pair. Most have no fault."""
    raw, synthetic = raw.strip(" .!?"), synthetic.strip(" .!?")
    first, _, rest = synthetic.partition(" ")
    # The first word differs from the source's, so that the caption is no verbatim copy.
    woven = f"{'The' if first.lower() == 'this' else 'This'} {rest or first}: {raw}"
    draw = zlib.crc32(f"{raw}\n{synthetic}".encode("utf-8", "replace")) / 2**32
    fault = next((name for name, until in _UNTIL if draw < until), None)
    return Caption(f"{woven}.") if fault is None else _faulty(fault, woven, raw, synthetic)


# The share of captions with each fault, as docs/gates.md counts them in the 8,000 published captions.
FAULTS = {
    "instruction_echo": 109 / 8000,
    "phrase of the instruction": 232 / 8000,
    "begun inside a sentence": 39 / 8000,
    "stopped at the limit": 234 / 8000,
    "unsupported_number": 17 / 8000,
    "unsupported_name": 61 / 8000,
    "lost_entity": 247 / 8000,
    "concatenation": 36 / 8000,
    "repetition": 15 / 8000,
    "copy_of_one": 6 / 8000,
    "too_short": 14 / 8000,
    "too_long": 43 / 8000,
}


def _cumulated() -> list[tuple[str, float]]:
    total, until = 0.0, []
    for name, rate in FAULTS.items():
        total += rate
        until.append((name, total))
    return until


_UNTIL = _cumulated()


def _faulty(fault: str, woven: str, raw: str, synthetic: str) -> Caption:
    words = woven.split()
    match fault:
        case "instruction_echo":
            return Caption(f"{woven}. The second sentence lacks detailed real-world information.")
        case "phrase of the instruction":
            return Caption(f"{woven}, in a real-world setting.")
        case "begun inside a sentence":
            return Caption(f"that is next to it, {raw}.")
        case "stopped at the limit":
            return Caption(" ".join(words[:-1]), ended=False)
        case "unsupported_number":
            return Caption(f"{woven}, made in 1743.")
        case "unsupported_name":
            return Caption(f"{woven}, as seen near Ouagadougou.")
        case "lost_entity":
            return Caption(f"{synthetic}, of a kind that is well known and often shown.")
        case "concatenation":
            return Caption(f"{synthetic}. {raw}.")
        case "repetition":
            return Caption(f"{woven} {' '.join(words[-6:])}.")
        case "copy_of_one":
            return Caption(f"{synthetic}.")
        case "too_short":
            return Caption(f"{' '.join(words[: max(len(words) // 7, 3)])}.")
        case _:
            return Caption(f"{woven}, {' '.join(_PADDING.split())}.")
