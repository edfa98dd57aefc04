"""Encode triples as token ids, and put them into batches of similar lengths.

A batch depends only on the seed, the worker's rank and the step, so a resumed run needs no saved state of a sampler.
T triples, L tokens.
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

# So many batches are drawn together, sorted by length and cut: enough for little padding, few enough to stay random.
POOL_BATCHES = 16
MAX_NEW_TOKENS = 80  # as in the reference decoder
MAX_PROMPT = 256  # tokens, as in the reference; no samples are drawn for a longer prompt
DRAWS = 10  # largest number of draws per pool: with tiny batches one draw may leave fewer rows than batches
MAX_TOKENS = 320  # a prompt of 256, as in the reference, and a caption of 64; longer sequences are cut on the right

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences with padding on the right. Causal attention never sees that padding, so no mask is needed."""

    ids_TL: Tensor  # int64
    weights_TL: Tensor  # float32, the loss weight of predicting this token from those before it
    triples: tuple[Triple, ...] = ()  # the triple of each row


def cached_by_word(encode: Encode) -> Encode:
    """Return an encoder that looks each word up in a cache. Correct only for a tokenizer that never merges over a space."""
    one = cache(encode)
    return lambda text: [i for word in text.split() for i in one(word)]


class Encoder(Protocol):
    """Encodes a triple as token ids and loss weights: 1 for the fused caption and its end, `source_weight` for the sources."""

    @property
    def end_id(self) -> int: ...

    def __call__(self, triple: Triple) -> tuple[list[int], list[float]]: ...

    def prompt(self, triple: Triple) -> list[int]:
        """Return the ids of the prompt, the same that the engines give the model; see capsfusion_ray/core/prompt.py."""


@dataclass(frozen=True)
class PieceEncoder:
    """For a tokenizer that never merges over the borders of the prompt's pieces, as ours. It encodes each piece alone."""

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
    """For any tokenizer. It encodes the whole text, because merges cross the borders of the pieces (": Christmas")."""

    template: Template
    tokenizer: Any
    end_id: int
    source_weight: float

    def __call__(self, triple: Triple) -> tuple[list[int], list[float]]:
        text, prompt = self.template.render(triple.raw, triple.synthetic), self.prompt(triple)
        # As a model writes it: after a space, unless the prompt ends with white space.
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
        """Encode a text, without the end token that some tokenizers add."""
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
    """Return the share of copy tasks at this step: 1 at first, then falling to augment.copy_share."""
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
    """Return whether to train on this sequence. A caption cut at the decoder's limit has no ending, so it is left out.

    With sampling, prompts over the limit are left out, too.
    """
    fused = weights.count(1.0)  # tokens of the caption, which follow those of the prompt
    return fused <= MAX_NEW_TOKENS and not (sampled and len(weights) - fused > MAX_PROMPT)


def pool(
    number: int, triples: Sequence[Triple], banks: Banks, encoder: Encoder, cfg: TrainConfig, pad_id: int, rank: int = 0
) -> list[Batch]:
    """Return the POOL_BATCHES batches from step number * POOL_BATCHES on. They depend only on seed, number and rank.

    Raises SourceError if hardly any triple is short enough to train on.
    """
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
            f"almost no triple has a fused caption of at most {MAX_NEW_TOKENS} tokens and a prompt of at most {MAX_PROMPT}; "
            "give data with shorter captions, or a tokenizer with a larger vocabulary"
        )
    rows.sort(key=lambda row: len(row[0][0]))
    # Cut evenly instead of n at a time, so that there are as many batches as steps, whatever was left out above.
    cuts = [len(rows) * i // POOL_BATCHES for i in range(POOL_BATCHES + 1)]
    batches = [pad([row for row, _ in rows[a:b]], pad_id, [t for _, t in rows[a:b]]) for a, b in pairwise(cuts)]
    rng.shuffle(batches)
    return batches
