"""Triples to token ids to length-bucketed batches; a batch depends on nothing but the seed and its step.

That makes resuming exact and stateless: nobody saves a sampler. T triples, L tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from capsfusion_ray.errors import SourceError
from capsfusion_ray.prompt import Template
from capsfusion_ray.train.augment import Banks, draw
from capsfusion_ray.train.config import TrainConfig
from capsfusion_ray.train.triples import Triple

POOL_BATCHES = 16  # batches drawn together and cut by length: enough that little is padded, few enough to stay random
MAX_NEW_TOKENS = 80  # of the reference decoder
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


@dataclass(frozen=True)
class Encoder:
    """A triple as token ids and loss weights."""

    template: Template
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


def copy_share(step: int, cfg: TrainConfig) -> float:
    """The share of copy tasks at this step: all, then fading to the configured rest."""
    a = cfg.augment
    faded = min(1.0, max(0.0, (step - a.copy_only_steps) / max(1, a.copy_fade_steps)))
    return 1.0 + (a.copy_share - 1.0) * faded


def pad(rows: Sequence[tuple[list[int], list[float]]], pad_id: int, triples: Sequence[Triple] = ()) -> Batch:
    longest = max(len(ids) for ids, _ in rows)
    ids_TL = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    weights_TL = torch.zeros((len(rows), longest))
    for i, (ids, weights) in enumerate(rows):
        ids_TL[i, : len(ids)] = torch.tensor(ids)
        weights_TL[i, : len(ids)] = torch.tensor(weights)
    return Batch(ids_TL, weights_TL, tuple(triples))


def pool(
    number: int, triples: Sequence[Triple], banks: Banks, encoder: Encoder, cfg: TrainConfig, pad_id: int, rank: int = 0
) -> list[Batch]:
    """The batches of steps number * POOL_BATCHES and following; the same for the same seed, number and rank."""
    rng = random.Random(f"pool-{cfg.optim.seed}-{number}-{rank}")
    n = cfg.optim.batch_triples
    indices = [rng.randrange(len(triples)) for _ in range(n * POOL_BATCHES)]
    drawn = draw(triples, indices, banks, cfg.augment, copy_share(number * POOL_BATCHES, cfg), rng)
    rows = sorted(((encoder(triple), triple) for triple in drawn), key=lambda row: len(row[0][0]))
    # A caption cut at the decoder's limit has no ending; better not to learn captions that long.
    rows = [row for row in rows if row[0][1].count(1.0) <= MAX_NEW_TOKENS]
    if len(rows) < POOL_BATCHES:
        raise SourceError(f"hardly a fused caption has at most {MAX_NEW_TOKENS} tokens; those are what a model can learn from")
    # Evenly, and not n at a time: whatever was left out above, there are as many batches as steps.
    cuts = [len(rows) * i // POOL_BATCHES for i in range(POOL_BATCHES + 1)]
    batches = [pad([row for row, _ in rows[a:b]], pad_id, [t for _, t in rows[a:b]]) for a, b in pairwise(cuts)]
    rng.shuffle(batches)
    return batches
