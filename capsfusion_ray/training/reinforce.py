"""Self-critical sequence training (Rennie et al., 2017): train on the model's own samples, weighted by their rewards.

A sample's weight says how much better it is than the other samples of its triple. T triples, K samples of each, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from capsfusion_ray.training.batches import MAX_NEW_TOKENS, MAX_PROMPT, Batch, Encoder, pad
from capsfusion_ray.training.config import ReinforceConfig
from capsfusion_ray.training.triples import Triple

if TYPE_CHECKING:
    from capsfusion_ray.training.reward import Reward


class Sample(NamedTuple):
    """A caption that the model wrote."""

    ids: list[int]  # with the end token, if the caption ended
    log_likelihood: float  # nats, sum over its tokens, under the model that wrote it


class Sampler:
    """Writes captions with a model: sampled token by token, or greedily."""

    def __init__(self, model: Any, tokenizer: Any, encoder: Encoder) -> None:
        self.model, self.tokenizer, self.encoder = model, tokenizer, encoder
        # A copy in bfloat16, because sampling takes most of the time and need not be exact.
        self._half = type(model)(model.config).to(model.device, torch.bfloat16).eval()

    def within_budget(self, triples: Sequence[Triple]) -> list[Triple]:
        return [triple for triple in triples if len(self.encoder.prompt(triple)) <= MAX_PROMPT]

    @torch.no_grad()
    def __call__(self, triples: Sequence[Triple], samples: int) -> list[list[Sample]]:
        """Return `samples` captions per triple, or the greedy caption if `samples` is 0."""
        self._half.load_state_dict(self.model.state_dict())
        pad_id, device, k = self.tokenizer.pad_token_id, self.model.device, max(1, samples)
        prompts = [self.encoder.prompt(triple) for triple in triples]
        longest = max(map(len, prompts))
        ids_TL = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts], device=device)
        mask_TL = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        drawn_NL = torch.full((len(prompts) * k, MAX_NEW_TOKENS), self.encoder.end_id, device=device)
        likelihood_N = torch.zeros(len(drawn_NL), device=device)
        unended_N = torch.ones(len(drawn_NL), dtype=torch.bool, device=device)  # for the samples still in the batch
        # Each prompt is read once for all its samples, and samples that ended leave the batch. This takes half as long as
        # HF's `generate`.
        cache = DynamicCache(config=self._half.config)
        logits_NV = self._logits(ids_TL, mask_TL, cache).repeat_interleave(k, dim=0)
        cache.batch_repeat_interleave(k)
        mask_NL, open_N = mask_TL.repeat_interleave(k, dim=0), torch.arange(len(prompts) * k, device=device)
        for step in range(MAX_NEW_TOKENS):
            chances_NV = logits_NV.float().softmax(dim=-1)
            ids_N = torch.multinomial(chances_NV, 1)[:, 0] if samples else chances_NV.argmax(dim=-1)
            drawn_NL[open_N, step] = ids_N
            likelihood_N[open_N] += chances_NV.gather(1, ids_N[:, None])[:, 0].log() * unended_N
            unended_N &= ids_N != self.encoder.end_id
            going_N = unended_N.nonzero()[:, 0]
            if not len(going_N) or step == MAX_NEW_TOKENS - 1:
                break
            if len(going_N) < 0.8 * len(open_N):
                cache.batch_select_indices(going_N)
                open_N, mask_NL, ids_N, unended_N = (
                    open_N[going_N],
                    mask_NL[going_N],
                    ids_N[going_N],
                    unended_N[going_N],
                )
            mask_NL = torch.cat((mask_NL, torch.ones_like(mask_NL[:, :1])), dim=1)
            logits_NV = self._logits(ids_N[:, None], mask_NL, cache)
        rows = [
            Sample(self._cut(ids), nats) for ids, nats in zip(drawn_NL.tolist(), likelihood_N.tolist(), strict=True)
        ]
        return [rows[i : i + k] for i in range(0, len(rows), k)]

    def _logits(self, ids_NL: Tensor, mask_NC: Tensor, cache: DynamicCache) -> Tensor:
        """Return the logits of the token after the last one. `mask_NC` also covers the columns of the cache."""
        position_NC = (mask_NC.cumsum(dim=1) - 1).clamp(min=0)
        out = self._half(
            input_ids=ids_NL,
            attention_mask=mask_NC,
            position_ids=position_NC[:, -ids_NL.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_NV: Tensor = out.logits[:, -1]
        return logits_NV

    def _cut(self, ids: list[int]) -> list[int]:
        end = self.encoder.end_id
        return ids[: ids.index(end) + 1] if end in ids else ids

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


class SelfCritic:
    """Turns triples into a batch: for each the samples of the model, then the teacher's caption with a small weight."""

    def __init__(self, cfg: ReinforceConfig, sampler: Sampler, reward: Reward, pad_id: int) -> None:
        self.cfg, self.sampler, self.reward, self.pad_id = cfg, sampler, reward, pad_id
        self._start = deepcopy(sampler.model).to(torch.bfloat16).eval()

    def __call__(self, triples: Sequence[Triple]) -> tuple[Batch, float]:
        """Return the batch, and the mean reward of its samples without the drift. `pool` left out prompts that are too long."""
        encoder = self.sampler.encoder
        sampled_TK = self.sampler(triples, self.cfg.samples)
        prompts = [encoder.prompt(triple) for triple in triples]
        reward_TK = torch.tensor(
            [
                [self.reward(triple, self.sampler.text(sample.ids)) for sample in sampled]
                for triple, sampled in zip(triples, sampled_TK, strict=True)
            ]
        )
        worth_TK = reward_TK - self.cfg.drift * self._drift(prompts, sampled_TK)
        rows = []
        for triple, prompt, sampled, advantages in zip(
            triples, prompts, sampled_TK, advantage(worth_TK).tolist(), strict=True
        ):
            rows += [_row(prompt, sample, weight) for sample, weight in zip(sampled, advantages, strict=True)]
            ids, weights = encoder(triple)
            rows.append((ids, [w * self.cfg.supervised_weight for w in weights]))
        return pad(rows, self.pad_id), float(reward_TK.mean())

    @torch.no_grad()
    def _drift(self, prompts: Sequence[list[int]], sampled_TK: Sequence[Sequence[Sample]]) -> Tensor:
        """Return how much likelier each sample is now than at the start of this training, in nats per token; [T, K]."""
        rows = [
            _row(prompt, sample, 1.0) for prompt, sampled in zip(prompts, sampled_TK, strict=True) for sample in sampled
        ]
        batch, device = pad(rows, self.pad_id), self._start.device
        ids_NL, own_NL = batch.ids_TL.to(device), batch.weights_TL.to(device)[:, 1:] > 0
        hidden_NLD = self._start.base_model(input_ids=ids_NL[:, :-1], use_cache=False).last_hidden_state
        logits_MV = self._start.get_output_embeddings()(hidden_NLD[own_NL]).float()
        before_NL = torch.zeros(own_NL.shape, device=device)
        before_NL[own_NL] = -cross_entropy(logits_MV, ids_NL[:, 1:][own_NL], reduction="none")
        now_N = torch.tensor([sample.log_likelihood for sampled in sampled_TK for sample in sampled])
        drift_N = (now_N - before_NL.sum(dim=1).cpu()) / own_NL.sum(dim=1).cpu()
        return drift_N.view(len(prompts), -1)

    def validate(self, triples: Sequence[Triple], batch: int = 64) -> float:
        """Return the mean reward of the greedy captions of `triples`, decoded `batch` at a time."""
        encoder = self.sampler.encoder
        triples = sorted(self.sampler.within_budget(triples), key=lambda triple: len(encoder.prompt(triple)))
        rewards = []
        for i in range(0, len(triples), batch):
            some = triples[i : i + batch]
            greedy = self.sampler(some, 0)
            rewards += [self.reward(t, self.sampler.text(only.ids)) for t, [only] in zip(some, greedy, strict=True)]
        return math.fsum(rewards) / max(1, len(rewards))


def _row(prompt: list[int], sample: Sample, weight: float) -> tuple[list[int], list[float]]:
    return prompt + sample.ids, [0.0] * len(prompt) + [weight] * len(sample.ids)


def advantage(reward_TK: Tensor) -> Tensor:
    """Return how much better each sample is than the mean of the others of its triple, in standard deviations of all."""
    k = reward_TK.shape[1]
    better_TK = (reward_TK - reward_TK.mean(dim=1, keepdim=True)) * k / (k - 1)
    return better_TK / (better_TK.std() + 1e-6)
