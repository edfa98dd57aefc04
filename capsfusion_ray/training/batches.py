"""Triples to token ids to length-bucketed batches; a batch depends on nothing but the seed and its step.

That makes resuming exact and stateless: nobody saves a sampler. T triples, L tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from capsfusion_ray.core.prompt import Template
from capsfusion_ray.errors import SourceError
from capsfusion_ray.training.augment import Banks, draw
from capsfusion_ray.training.config import TrainConfig
from capsfusion_ray.training.triples import Triple

POOL_BATCHES = 16  # batches drawn together and cut by length: enough that little is padded, few enough to stay random
MAX_NEW_TOKENS = 80  # of the reference decoder
MAX_PROMPT = 256  # tokens, the budget of the reference; a longer prompt is not sampled from
DRAWS = 10  # of a pool, at most: where batches are tiny, a few captions left out may leave fewer rows than batches
MAX_TOKENS = 320  # a prompt of 256, the budget of the reference, and a caption of 64; longer ones are cut on the right

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded: causal attention never looks at the padding, so no mask is needed."""

    ids_TL: Tensor  # int64
    weights_TL: Tensor  # float32; the loss weight of predicting this token from those before it
    triples: tuple[Triple, ...] = ()  # what was drawn, a row each


def cached_by_word(encode: Encode) -> Encode:
    """The same ids, a dictionary look-up a word: right only for a tokenizer that never merges over a space."""
    one = cache(encode)
    return lambda text: [i for word in text.split() for i in one(word)]


class Encoder(Protocol):
    """A triple as token ids and loss weights: 1 for the fused caption and its end, `source_weight` for the sources."""

    @property
    def end_id(self) -> int: ...

    def __call__(self, triple: Triple) -> tuple[list[int], list[float]]: ...

    def prompt(self, triple: Triple) -> list[int]:
        """The ids that the engines give the model for it; see capsfusion_ray/core/prompt.py."""


@dataclass(frozen=True)
class PieceEncoder:
    """For a tokenizer that merges nothing over the seams of the prompt, as ours: its pieces are encoded one by one."""

    encode: Encode  # text to ids, no special tokens added
    prefix_ids: list[int]
    between_ids: list[int]
    cue_ids: list[int]
    end_id: int
    source_weight: float

    def __call__(self, triple: Triple) -> tuple[list[int], list[float]]:
        raw, synthetic, fused = (self.encode(side) for side in (triple.raw, triple.synthetic, triple.fused))
        prompt = self._join(raw, synthetic)
        w = self.source_weight
        weights = [0.0] * len(self.prefix_ids) + [w] * len(raw) + [0.0] * len(self.between_ids) + [w] * len(synthetic)
        weights += [0.0] * len(self.cue_ids) + [1.0] * (len(fused) + 1)
        return (prompt + fused + [self.end_id])[:MAX_TOKENS], weights[:MAX_TOKENS]

    def prompt(self, triple: Triple) -> list[int]:
        return self._join(self.encode(triple.raw), self.encode(triple.synthetic))

    def _join(self, raw: list[int], synthetic: list[int]) -> list[int]:
        return self.prefix_ids + raw + self.between_ids + synthetic + self.cue_ids


@dataclass(frozen=True)
class TextEncoder:
    """For any tokenizer. Its merges reach over the seams of the prompt (": Christmas", not ":" and "Christmas"), so the whole text is encoded."""

    template: Template
    tokenizer: Any
    end_id: int
    source_weight: float

    def __call__(self, triple: Triple) -> tuple[list[int], list[float]]:
        text, prompt = self.template.render(triple.raw, triple.synthetic), self.prompt(triple)
        # As a model writes it: after a space, unless the prompt ends in one.
        space = "" if text[-1:].isspace() else " "
        whole = self._ids(text + space + triple.fused)
        fused = (
            whole[len(prompt) :] if whole[: len(prompt)] == prompt else self._ids(space + triple.fused, special=False)
        )
        weights = self._source_weights(triple, text, len(prompt)) + [1.0] * (len(fused) + 1)
        return (prompt + fused + [self.end_id])[:MAX_TOKENS], weights[:MAX_TOKENS]

    def prompt(self, triple: Triple) -> list[int]:
        return self._ids(self.template.render(triple.raw, triple.synthetic))

    def _ids(self, text: str, special: bool = True) -> list[int]:
        """Without the end that some tokenizers add."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids[:-1] if ids[-1:] == [self.end_id] else ids

    def _source_weights(self, triple: Triple, text: str, tokens: int) -> list[float]:
        if not self.source_weight:
            return [0.0] * tokens
        raw = len(self.template.before_raw)
        synthetic = raw + len(triple.raw) + len(self.template.between)
        sources = ((raw, raw + len(triple.raw)), (synthetic, synthetic + len(triple.synthetic)))
        places = self.tokenizer(text, return_offsets_mapping=True)["offset_mapping"][:tokens]
        return [self.source_weight * any(a < end and b > begin for begin, end in sources) for a, b in places]


def copy_share(step: int, cfg: TrainConfig) -> float:
    """The share of copy tasks at this step: all, then fading to the configured rest; that alone where no curriculum is asked for."""
    a = cfg.augment
    into = step - a.copy_only_steps
    if into >= a.copy_fade_steps:
        return a.copy_share
    return 1.0 + (a.copy_share - 1.0) * max(0.0, into / a.copy_fade_steps)


def pad(rows: Sequence[tuple[list[int], list[float]]], pad_id: int, triples: Sequence[Triple] = ()) -> Batch:
    longest = max(len(ids) for ids, _ in rows)
    ids_TL = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    weights_TL = torch.zeros((len(rows), longest))
    for i, (ids, weights) in enumerate(rows):
        ids_TL[i, : len(ids)] = torch.tensor(ids)
        weights_TL[i, : len(ids)] = torch.tensor(weights)
    return Batch(ids_TL, weights_TL, tuple(triples))


def _is_learnt(weights: list[float], sampled: bool) -> bool:
    """A caption cut at the decoder's limit has no ending; and samples are drawn for prompts within the budget alone."""
    fused = weights.count(1.0)  # the last tokens; the prompt's are before them
    return fused <= MAX_NEW_TOKENS and not (sampled and len(weights) - fused > MAX_PROMPT)


def pool(
    number: int, triples: Sequence[Triple], banks: Banks, encoder: Encoder, cfg: TrainConfig, pad_id: int, rank: int = 0
) -> list[Batch]:
    """The batches of steps number * POOL_BATCHES and following; the same for the same seed, number and rank."""
    rng = random.Random(f"pool-{cfg.optim.seed}-{number}-{rank}")
    n = cfg.optim.batch_triples
    rows: list[tuple[tuple[list[int], list[float]], Triple]] = []
    for _ in range(DRAWS):
        indices = [rng.randrange(len(triples)) for _ in range(n * POOL_BATCHES)]
        drawn = draw(triples, indices, banks, cfg.augment, copy_share(number * POOL_BATCHES, cfg), rng)
        rows += [
            (row, triple) for triple in drawn if _is_learnt((row := encoder(triple))[1], bool(cfg.reinforce.samples))
        ]
        if len(rows) >= POOL_BATCHES:
            break
    else:
        raise SourceError(
            f"hardly a fused caption has at most {MAX_NEW_TOKENS} tokens, or a prompt at most {MAX_PROMPT}; those are what a model can learn from"
        )
    rows.sort(key=lambda row: len(row[0][0]))
    # Evenly, and not n at a time: whatever was left out above, there are as many batches as steps.
    cuts = [len(rows) * i // POOL_BATCHES for i in range(POOL_BATCHES + 1)]
    batches = [pad([row for row, _ in rows[a:b]], pad_id, [t for _, t in rows[a:b]]) for a, b in pairwise(cuts)]
    rng.shuffle(batches)
    return batches
