"""An engine without a model: for plumbing and scale. Deterministic, no torch, no tokenizer.

It writes "{synthetic} {raw}" as one sentence, so that lengths, numbers and names are those of a real caption and the
gates have something to judge. It is no fusion model: its captions are near-concatenations.
"""

from __future__ import annotations

from collections.abc import Sequence

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.engines.base import Load
from capsfusion_ray.rows import FinishReason, Generation, Prompt


class EchoEngine:
    """Implements engines.base.Engine."""

    def __init__(self, engine: EngineConfig, decode: DecodeConfig) -> None:
        self._max_words = decode.max_new_tokens
        self._queue: list[Prompt] = []

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[] for _ in texts]

    def submit(self, prompts: Sequence[Prompt]) -> None:
        self._queue.extend(prompts)

    @property
    def unfinished(self) -> int:
        return len(self._queue)

    @property
    def load(self) -> Load:
        return Load(len(self._queue), len(self._queue))

    def step(self) -> list[Generation]:
        prompts, self._queue = self._queue, []
        return [self._write(prompt) for prompt in prompts]

    def _write(self, prompt: Prompt) -> Generation:
        words = f"{prompt.synthetic.rstrip(' .!?')}: {prompt.raw.rstrip(' .!?')}.".split()
        finish = FinishReason.EOS if len(words) <= self._max_words else FinishReason.LENGTH
        text = " ".join(words[: self._max_words])
        # Words stand for tokens here; no tokenizer is loaded.
        return Generation(prompt.id, text, finish, len(prompt.text.split()), min(len(words), self._max_words))
