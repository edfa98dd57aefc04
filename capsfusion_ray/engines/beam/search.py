"""Beam search on the device: choose the next tokens, keep the finished hypotheses, and decide when a caption is done.

It knows no model and no cache. There are two scorings. Each was read from its source and is compared with it token for
token by the tests:

`transformers` (5.x, `GenerationMixin._beam_search`): score = log-probability / n ** length_penalty, where n counts the
generated tokens with the EOS. At max_new_tokens the best K candidates become hypotheses, whether they end with an EOS or not.

`reference` (4.28.1, `BeamSearchScorer`): score = log-probability / (padded_prompt + n) ** length_penalty, where n counts
the generated tokens without the EOS, computed in Python floats. At max_new_tokens the open beams become hypotheses,
unless the row was done before. In 4.28.1 `cur_len += 1` is inside the loop over the batch, so a row's stop test depends
on its place in the batch. Here each row gets what 4.28.1 gives to the first row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # tokens per block of the vocabulary, of which `best_continuations` takes the maximum
NEVER = -1.0e9  # the score of a hypothesis that does not exist, as in both versions of transformers


@dataclass(frozen=True)
class SearchPlan:
    """The settings of a search.

    `padded_prompt_tokens` is the length to which the reference padded each prompt (engine.max_prompt_tokens). Only the
    `reference` scoring uses it.
    """

    num_beams: int
    max_new_tokens: int
    scoring: Literal["reference", "transformers"]
    length_penalty: float
    padded_prompt_tokens: int
    no_repeat_ngram: int
    eos_ids: tuple[int, ...]

    @property
    def candidates(self) -> int:
        """C, the number of continuations to look at: K of them do not end, even if each beam could end with each EOS."""
        return max(2, 1 + len(self.eos_ids)) * self.num_beams

    @property
    def score_dtype(self) -> torch.dtype:
        """4.28.1 computes the scores of hypotheses in Python floats, 5.x in float32 tensors."""
        return torch.float64 if self.scoring == "reference" else torch.float32


@dataclass
class BeamState:
    """The search of B rows with K beams each. All tensors are on the device."""

    scores_BK: Tensor  # float32, log-probability of each open beam
    tokens_BKT: Tensor  # int64, generated tokens of each open beam
    length_B: Tensor  # int64, number of generated tokens so far
    kept_BK: Tensor  # scores of the best finished hypotheses, in any order; NEVER where there is none
    best_score_B: Tensor
    best_tokens_BT: Tensor  # int64, without the EOS
    best_length_B: Tensor  # int64, without the EOS
    best_eos_B: Tensor  # bool, the best hypothesis ended with an EOS
    done_B: Tensor  # bool
    failed_B: Tensor  # bool, the model gave NaN or infinite scores; such a row is done, too

    @classmethod
    def empty(cls, rows: int, plan: SearchPlan, device: torch.device) -> BeamState:
        """Start `rows` searches. As in HF only beam 0 counts at the start; otherwise all beams would be equal."""
        k, t = plan.num_beams, plan.max_new_tokens
        score = plan.score_dtype
        scores_BK = torch.full((rows, k), NEVER, device=device)
        scores_BK[:, 0] = 0.0

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            scores_BK=scores_BK,
            tokens_BKT=zeros(rows, k, t),
            length_B=zeros(rows),
            kept_BK=torch.full((rows, k), NEVER, dtype=score, device=device),
            best_score_B=torch.full((rows,), NEVER, dtype=score, device=device),
            best_tokens_BT=zeros(rows, t),
            best_length_B=zeros(rows),
            best_eos_B=zeros(rows, dtype=torch.bool),
            done_B=zeros(rows, dtype=torch.bool),
            failed_B=zeros(rows, dtype=torch.bool),
        )

    def rows(self, index: slice | Tensor) -> BeamState:
        """Return the state of some rows: for a slice a view that shares memory, for an index tensor a copy."""
        return BeamState(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def put(self, index: slice | Tensor, other: BeamState) -> None:
        """Overwrite rows with the rows of another state."""
        for f in fields(self):
            getattr(self, f.name)[index] = getattr(other, f.name)


class Candidates(NamedTuple):
    """The C best continuations of each row, best first."""

    logprob_BC: Tensor  # float32, log-probability of the beam with this token
    parent_BC: Tensor  # int64, the beam that is continued
    token_BC: Tensor  # int64
    eos_BC: Tensor  # bool, the token is an EOS

    def at(self, column_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The parent, the token and the EOS flag of one candidate per row, [B] each."""
        return _at(self.parent_BC, column_B), _at(self.token_BC, column_B), _at(self.eos_BC, column_B)


class Search:
    """Advances a BeamState by one token. It holds only constants."""

    def __init__(self, plan: SearchPlan, device: torch.device) -> None:
        self.plan = plan
        t, k, c = plan.max_new_tokens, plan.num_beams, plan.candidates
        # Element n is the divisor of a hypothesis of n tokens. The stop test also needs the length after the last one.
        offset = plan.padded_prompt_tokens if plan.scoring == "reference" else 0
        powers = [float(max(offset + n, 1)) ** plan.length_penalty for n in range(t + 2)]
        self._divisor_T = torch.tensor(powers, dtype=torch.float64, device=device).to(plan.score_dtype)
        self._rank_C = torch.arange(c, device=device)
        self._top_C = self._rank_C < k
        self._eos_ids = torch.tensor(plan.eos_ids, device=device)

    def advance(self, state: BeamState, logits_BQV: Tensor) -> Tensor:
        """Choose the next token of each beam, in place. Returns the parent beam of each new beam, int64 [B, K].

        `logits_BQV` are the next-token logits of the open beams: Q = K, or Q = 1 for rows before their first token.
        Rows that are done keep their best hypothesis; the contents of their beams have no meaning.
        """
        logprobs_BQV = logits_BQV.float()  # as HF, which converts logits to float32 before the softmax
        if self.plan.num_beams == 1:
            return self._advance_greedy(state, logprobs_BQV)
        found = self._candidates(state, torch.log_softmax(logprobs_BQV, dim=-1))
        state.failed_B |= ~state.done_B & ~found.logprob_BC[:, 0].isfinite()  # NaN is sorted first
        state.done_B |= state.failed_B
        length_B = state.length_B + ~state.done_B  # with the token chosen now
        self._keep_finished(state, found, length_B)
        # The first K candidates that do not end, in their order, are the new beams.
        order_BK = (self._rank_C + found.eos_BC * self._rank_C.numel()).argsort(dim=1)[:, : self.plan.num_beams]
        parent_BK, token_BK = found.parent_BC.gather(1, order_BK), found.token_BC.gather(1, order_BK)
        state.scores_BK.copy_(found.logprob_BC.gather(1, order_BK))
        if self.plan.scoring == "transformers":
            self._stop_transformers(state, length_B)
        else:
            self._stop_reference(state, found, parent_BK, token_BK, length_B)
        self._append(state, parent_BK, token_BK, length_B)
        return parent_BK

    def _candidates(self, state: BeamState, logprobs_BQV: Tensor) -> Candidates:
        if self.plan.no_repeat_ngram:
            block_repeats(logprobs_BQV, state.tokens_BKT, state.length_B, self.plan.no_repeat_ngram)
        cand_BC, parent_BC, token_BC = best_continuations(logprobs_BQV, state.scores_BK, self.plan.candidates)
        return Candidates(cand_BC, parent_BC, token_BC, torch.isin(token_BC, self._eos_ids))

    def _keep_finished(self, state: BeamState, found: Candidates, length_B: Tensor) -> None:
        """Candidates among the best K that end become hypotheses; the K best hypotheses of each row are kept."""
        k = self.plan.num_beams
        if self.plan.scoring == "transformers":
            at_cap_B = length_B >= self.plan.max_new_tokens
            ends_BC = (found.eos_BC | at_cap_B[:, None]) & self._top_C
            score_BC = found.logprob_BC / self._divisor_T[length_B][:, None]
        else:
            ends_BC = found.eos_BC & self._top_C
            score_BC = found.logprob_BC.double() / self._divisor_T[length_B - 1][:, None]
        score_BC = torch.where(ends_BC & ~state.done_B[:, None], score_BC, NEVER)
        merged_BK = torch.cat((state.kept_BK, score_BC[:, :k]), dim=1).topk(k, dim=1).values
        state.kept_BK.copy_(merged_BK)
        top_B, winner_B = score_BC.max(dim=1)
        self._keep_best(state, top_B, *found.at(winner_B), length_B)

    def _stop_transformers(self, state: BeamState, length_B: Tensor) -> None:
        """A row is done when its best open beam cannot beat its worst kept hypothesis, or at max_new_tokens."""
        worst_B = state.kept_BK.amin(dim=1)  # NEVER while fewer than K have finished
        attainable_B = state.scores_BK[:, 0] / self._divisor_T[length_B]
        state.done_B |= ~(attainable_B > worst_B) | (length_B >= self.plan.max_new_tokens)

    def _stop_reference(
        self, state: BeamState, found: Candidates, parent_BK: Tensor, token_BK: Tensor, length_B: Tensor
    ) -> None:
        """A row is done when its best candidate cannot beat its worst kept hypothesis, or at max_new_tokens.

        At max_new_tokens the best open beam of a row that is not done becomes a hypothesis.
        """
        at_cap_B = length_B >= self.plan.max_new_tokens
        worst_B = state.kept_BK.amin(dim=1)  # NEVER while fewer than K have finished
        attainable_B = found.logprob_BC[:, 0].double() / self._divisor_T[length_B]
        state.done_B |= (worst_B > NEVER) & (worst_B >= attainable_B)
        open_B = torch.where(at_cap_B & ~state.done_B, state.scores_BK[:, 0] / self._divisor_T[length_B], NEVER)
        no_eos_B = torch.zeros_like(at_cap_B)
        self._keep_best(state, open_B, parent_BK[:, 0], token_BK[:, 0], no_eos_B, length_B)
        state.done_B |= at_cap_B

    def _advance_greedy(self, state: BeamState, logits_BQV: Tensor) -> Tensor:
        """With one beam both versions of HF search greedily: they take the token with the highest logit, until an EOS."""
        if self.plan.no_repeat_ngram:
            block_repeats(logits_BQV, state.tokens_BKT, state.length_B, self.plan.no_repeat_ngram)
        top_B1, token_B1 = logits_BQV[:, 0].max(dim=1, keepdim=True)
        logprob_B = top_B1[:, 0] - logits_BQV[:, 0].logsumexp(dim=1)
        state.failed_B |= ~state.done_B & ~logprob_B.isfinite()
        state.done_B |= state.failed_B
        live_B = ~state.done_B
        length_B = state.length_B + live_B
        eos_B = torch.isin(token_B1[:, 0], self._eos_ids)
        ends_B = eos_B | (length_B >= self.plan.max_new_tokens)
        state.scores_BK.add_(torch.where(live_B, logprob_B, 0.0)[:, None])
        counted_B = length_B - (eos_B & live_B).long() if self.plan.scoring == "reference" else length_B
        score_B = torch.where(ends_B & live_B, state.scores_BK[:, 0] / self._divisor_T[counted_B], NEVER)
        parent_B1 = torch.zeros_like(token_B1)
        self._keep_best(state, score_B.to(self.plan.score_dtype), parent_B1[:, 0], token_B1[:, 0], eos_B, length_B)
        state.done_B |= ends_B
        self._append(state, parent_B1, token_B1, length_B)
        return parent_B1

    def _keep_best(
        self, state: BeamState, score_B: Tensor, parent_B: Tensor, token_B: Tensor, eos_B: Tensor, length_B: Tensor
    ) -> None:
        """Where its score is higher, take a hypothesis as the row's best one.

        A hypothesis is its parent's tokens and one more token, which is left out if it is an EOS.
        """
        wins_B = score_B > state.best_score_B
        tokens_BT = state.tokens_BKT[torch.arange(parent_B.numel(), device=parent_B.device), parent_B]
        tokens_BT = tokens_BT.scatter(1, (length_B - 1).clamp(min=0)[:, None], token_B[:, None])
        state.best_score_B.copy_(torch.where(wins_B, score_B, state.best_score_B))
        state.best_tokens_BT.copy_(torch.where(wins_B[:, None], tokens_BT, state.best_tokens_BT))
        state.best_length_B.copy_(torch.where(wins_B, length_B - eos_B.long(), state.best_length_B))
        state.best_eos_B.copy_(torch.where(wins_B, eos_B, state.best_eos_B))

    def _append(self, state: BeamState, parent_BK: Tensor, token_BK: Tensor, length_B: Tensor) -> None:
        """Each new beam is its parent and one more token."""
        tokens_BKT = state.tokens_BKT.gather(1, parent_BK[:, :, None].expand_as(state.tokens_BKT))
        at_BK1 = (length_B - 1).clamp(min=0)[:, None, None].expand(-1, token_BK.shape[1], 1)
        state.tokens_BKT.copy_(tokens_BKT.scatter(2, at_BK1, token_BK[:, :, None]))
        state.length_B.copy_(length_B)


def best_continuations(logprobs_BQV: Tensor, scores_BK: Tensor, candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the C highest sums of a beam's score and a token's log-probability, highest first.

    Returns the sums, their beams and their tokens, [B, C] each. `logprobs_BQV` may have Q < K beams; then only the first
    Q scores are used. The search looks only into the C blocks of tokens with the highest maxima: the best C sums cannot
    be elsewhere. Selecting among all Q*V sums takes several times as long.
    """
    queries, vocabulary = logprobs_BQV.shape[1:]
    score_BQ = scores_BK[:, :queries]
    if vocabulary % BLOCK:
        logprobs_BQV = F.pad(logprobs_BQV, (0, -vocabulary % BLOCK), value=float("-inf"))
    blocks_BQNS = logprobs_BQV.unflatten(2, (-1, BLOCK))
    # A rounded sum of floats never falls when a summand grows, so the maximum may be taken before the score is added.
    best_BQN = blocks_BQNS.amax(dim=3) + score_BQ[:, :, None]
    blocks = best_BQN.shape[2]
    block_BC = best_BQN.flatten(1).topk(min(candidates, queries * blocks), dim=1).indices
    inside_BCS = blocks_BQNS.flatten(1, 2).gather(1, block_BC[:, :, None].expand(-1, -1, BLOCK))
    sums_BCS = inside_BCS + score_BQ.gather(1, block_BC // blocks)[:, :, None]
    cand_BC, at_BC = sums_BCS.flatten(1).topk(candidates, dim=1)
    block_BC = block_BC.gather(1, at_BC // BLOCK)
    # Where few tokens are allowed, the padding can be among the candidates. Its sum is -inf, as for tokens not allowed.
    token_BC = (block_BC % blocks * BLOCK + at_BC % BLOCK).clamp(max=vocabulary - 1)
    return cand_BC, block_BC // blocks, token_BC


def block_repeats(logprobs_BQV: Tensor, tokens_BKT: Tensor, length_B: Tensor, size: int) -> None:
    """Set to -inf, in place, each token that would complete an n-gram of `size` already generated by the same beam.

    Unlike HF's `no_repeat_ngram_size` this ignores the prompt, because a fused caption must repeat words of its sources.
    """
    rows, queries, vocabulary = logprobs_BQV.shape
    tokens_BQT = tokens_BKT[:, :queries]
    follows_BQW = tokens_BQT[:, :, size - 1 :]  # the token after the window of size-1 that starts at w
    windows = follows_BQW.shape[2]
    if windows <= 0:
        return
    start_W = torch.arange(windows, device=tokens_BKT.device)
    match_BQW = (start_W + size - 1 < length_B[:, None])[:, None, :].expand(rows, queries, windows).clone()
    for i in range(size - 1):
        last_B = (length_B - (size - 1) + i).clamp(min=0)
        last_BQ1 = tokens_BQT.gather(2, last_B[:, None, None].expand(rows, queries, 1))
        match_BQW &= tokens_BQT[:, :, i : i + windows] == last_BQ1
    blocked_BQV = torch.zeros(rows, queries, vocabulary + 1, dtype=torch.bool, device=tokens_BKT.device)
    blocked_BQV.scatter_(2, torch.where(match_BQW, follows_BQW, vocabulary), True)
    logprobs_BQV.masked_fill_(blocked_BQV[:, :, :vocabulary], float("-inf"))


def _at(values_BC: Tensor, column_B: Tensor) -> Tensor:
    return values_BC.gather(1, column_B[:, None])[:, 0]
