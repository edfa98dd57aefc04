"""The beam engine: prompts wait in a queue, captions are decoded in slots, and a free slot goes to the next prompt.

The batch is the rows of all slots. Every few steps the host reads the rows' stop flags, returns the finished captions
and refills their slots. In float32 the batch shrinks when the queue is empty. In bfloat16 it keeps its size, because a
matrix product of another size rounds differently, and two runs with the same slots and the same order of prompts must
agree to the last bit. Knows no Ray.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.core.types import FinishReason, Generation, Prompt
from capsfusion_ray.engines.base import Occupancy, prompt_fault
from capsfusion_ray.engines.beam.cache import Cache, Prefix
from capsfusion_ray.engines.beam.network import Network
from capsfusion_ray.engines.beam.search import BeamState, Search, SearchPlan
from capsfusion_ray.engines.beam.slots import PREFILL_TOKENS, arrange, plan_slots, release_cached
from capsfusion_ray.engines.beam.weights import Weights, take_weights
from capsfusion_ray.engines.loading import LoadedModel
from capsfusion_ray.errors import EngineError

log = logging.getLogger(__name__)

# Decode steps per read of the stop flags. Reading them waits for the device. With 4 steps a finished row waits 1.5 steps
# on average, of about 41 that a caption takes.
STEPS_PER_READ = {"cpu": 1, "cuda": 4}
# Device types on which an out-of-memory error can be caught. There the engine tries a step of the largest possible size
# before it takes the first caption.
REHEARSED_ON = {"cuda"}
SHARED_PREFIX = 16  # tokens; a shorter prefix is not shared, because it is cheaper to read it again with each suffix
REFILL_SHARE = 16  # a refill waits until 1/16 of the slots are free, so that one prefill takes several suffixes


class BeamEngine:
    """Beam search for models with the Llama architecture. Implements engines.base.Engine."""

    def __init__(
        self, loaded: LoadedModel, engine: EngineConfig, decode: DecodeConfig, weights: Weights | None = None
    ) -> None:
        """Takes the weights out of the model, which is unusable afterwards.

        `weights` are those that `take_weights` took from this model before. Several engines may share them.
        """
        asked = decode.resolved()
        self._loaded = loaded
        self._asked_slots = engine.slots
        self._max_prompt_tokens = engine.max_prompt_tokens
        self._plan = SearchPlan(
            num_beams=asked.num_beams,
            max_new_tokens=asked.max_new_tokens,
            scoring=asked.scoring,
            length_penalty=asked.length_penalty,
            padded_prompt_tokens=engine.max_prompt_tokens,
            no_repeat_ngram=asked.no_repeat_ngram,
            eos_ids=loaded.eos_ids,
        )
        with torch.inference_mode():
            weights = weights or take_weights(loaded, engine.max_prompt_tokens + decode.max_new_tokens)
        self._network = Network(weights, engine.attention)
        self._device = self._network.weights.device
        self._search = Search(self._plan, self._device)
        self._steps_per_read = STEPS_PER_READ[self._device.type]
        self._shrinks = self._network.weights.dtype != torch.bfloat16
        self._queue: deque[Prompt] = deque()
        self._rows: list[Prompt | None] = []  # the prompt in each slot of the batch; None for an idle slot
        self._ends: list[int] = []  # upper bound of the columns of the cache that each slot uses
        self._failed: list[Generation] = []  # prompts that `submit` refused
        self._prefix: Prefix | None = None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._loaded.encode(list(texts))

    @property
    def unfinished(self) -> int:
        return len(self._queue) + len(self._failed) + sum(prompt is not None for prompt in self._rows)

    @property
    def occupancy(self) -> Occupancy:
        if self._prefix is None:  # no prompt was submitted yet
            return Occupancy(0, 0)
        busy = sum(prompt is not None for prompt in self._rows)
        return Occupancy(busy, self._slots, sum(self._ends) / (self._slots * self._cache.columns))

    def submit(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if not prompt.suffix_ids:
                self._failed.append(Generation.failed(prompt, "the prompt has no token after the constant prefix"))
            elif error := prompt_fault(prompt, self._max_prompt_tokens):
                self._failed.append(Generation.failed(prompt, error))
            elif len(prompt.prefix_ids) < SHARED_PREFIX:
                self._queue.append(replace(prompt, prefix_ids=(), suffix_ids=prompt.prefix_ids + prompt.suffix_ids))
            else:
                self._queue.append(prompt)

    @torch.inference_mode()
    def step(self) -> list[Generation]:
        """Refill free slots, decode STEPS_PER_READ tokens for each row, and return the finished captions."""
        finished, self._failed = self._failed, []
        try:
            self._refill()
            if not any(prompt is not None for prompt in self._rows):
                return finished
            for _ in range(self._steps_per_read):
                self._decode()
            finished += self._take_finished()
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"engine.slots={self._slots}: out of memory while decoding ({error}); set a lower engine.slots"
            ) from error
        return finished

    # ------------------------------------------------------------------------------------------------ slots and queue

    def _use_prefix(self, ids: tuple[int, ...]) -> None:
        """Compute a constant prefix, and allocate the rows that read it."""
        if self._prefix is not None:
            del self._cache, self._state  # otherwise memory would have to hold the old rows and the new ones
        self._prefix = self._network.prefix(ids)
        suffix_columns = self._max_prompt_tokens - len(ids)
        plan = plan_slots(self._asked_slots, self._network.weights, self._plan, suffix_columns, len(ids))
        self._slots = plan.slots
        while shortage := self._allocate(self._prefix, self._slots, suffix_columns):
            if self._slots == 1:
                raise EngineError(
                    f"engine.model={self._loaded.name!r}: there is no memory for a single caption ({shortage}); use a GPU "
                    "with more memory, or lower engine.max_prompt_tokens or decode.max_new_tokens"
                )
            fewer = self._slots * 3 // 4
            log.warning("out of memory with %d slots (%s); trying %d slots", self._slots, plan.why, fewer)
            release_cached()  # otherwise the smaller tensors would be cut out of the larger blocks of the last try
            self._slots = fewer
        log.info("%d slots (%s), %d prefix tokens, %d suffix columns", self._slots, plan.why, len(ids), suffix_columns)

    def _allocate(self, prefix: Prefix, slots: int, suffix_columns: int) -> str:
        """Allocate cache and state of `slots` rows. Returns "", or the message of the out-of-memory error.

        On a GPU it also runs one prefill and one decode step of the largest possible size, so that no later step needs
        more memory than these found.
        """
        weights, plan = self._network.weights, self._plan
        try:
            cache = Cache.allocate(slots, suffix_columns, plan.num_beams, plan.max_new_tokens, weights)
            state = BeamState.empty(slots, plan, self._device)
            if self._device.type in REHEARSED_ON:
                rows = torch.arange(
                    max(1, min(slots, PREFILL_TOKENS[self._device.type] // suffix_columns)), device=self._device
                )
                tokens_RS = torch.zeros(len(rows), suffix_columns, dtype=torch.int64, device=self._device)
                self._network.prefill(cache, prefix, rows, tokens_RS, torch.full_like(rows, suffix_columns))
                ends = [cache.columns] * slots
                logits = self._network.decode(cache, prefix, state.tokens_BKT[:, :, 0], state.length_B, ends)
                self._search.advance(state, logits)
                state = BeamState.empty(slots, plan, self._device)
                cache.clear()
        except torch.OutOfMemoryError as error:
            return str(error)  # this also frees the tensors of this call before the next try
        state.done_B.fill_(True)  # an idle slot takes part in each step; its prefill starts its search
        self._cache, self._state = cache, state
        return ""

    def _refill(self) -> None:
        """Give free slots to queued prompts, as soon as enough slots are free."""
        if not self._queue:
            return
        ids = self._queue[0].prefix_ids
        if self._prefix is None or self._prefix.ids != ids:
            if any(prompt is not None for prompt in self._rows):
                return  # unfinished rows read the old prefix, so they must finish first
            self._rows, self._ends = [], []
            self._use_prefix(ids)
        free = self._slots - sum(prompt is not None for prompt in self._rows)
        if free < min(len(self._queue), max(1, self._slots // REFILL_SHARE)):
            return
        fresh: list[Prompt] = []
        while len(fresh) < free and self._queue and self._queue[0].prefix_ids == ids:
            fresh.append(self._queue.popleft())
        admitted = self._arrange(fresh)
        admitted.sort(key=lambda pair: len(pair[1].suffix_ids))  # chunks of similar lengths need less padding
        budget = PREFILL_TOKENS[self._device.type]
        chunk: list[tuple[int, Prompt]] = []
        for pair in admitted:
            if chunk and (len(chunk) + 1) * len(pair[1].suffix_ids) > budget:
                self._prefill(chunk)
                chunk = []
            chunk.append(pair)
        self._prefill(chunk)

    def _arrange(self, fresh: Sequence[Prompt]) -> list[tuple[int, Prompt]]:
        """Give each live and each new prompt its slot. Returns the (slot, prompt) pairs of the new ones.

        The rows of one attention product get similar numbers of columns. A batch that may shrink has no idle slot
        afterwards.
        """
        live = [slot for slot, prompt in enumerate(self._rows) if prompt is not None]
        ends = [self._ends[slot] for slot in live] + [len(prompt.suffix_ids) for prompt in fresh]
        size = len(ends) if self._shrinks else self._slots
        slots = arrange(ends, live, size, self._network.rows_together)
        moves = [(a, b, end) for a, b, end in zip(live, slots, ends, strict=False) if a != b]
        if moves:
            self._cache.move(moves)
            sources, targets, _ = torch.tensor(moves, device=self._device).unbind(1)
            self._state.put(targets, self._state.rows(sources))
            left = sorted({a for a, _, _ in moves} - {b for _, b, _ in moves})
            self._state.done_B[left] = True
            self._cache.visible_BKN[left] = False
        prompts = [self._rows[slot] for slot in live] + list(fresh)
        self._rows, self._ends = [None] * size, [0] * size
        for slot, prompt, end in zip(slots, prompts, ends, strict=True):
            self._rows[slot], self._ends[slot] = prompt, end
        return list(zip(slots[len(live) :], fresh, strict=True))

    def _prefill(self, admitted: list[tuple[int, Prompt]]) -> None:
        """Read the suffixes of new rows into the cache, and choose the first token of each of their beams."""
        assert self._prefix is not None
        longest = max(len(prompt.suffix_ids) for _, prompt in admitted)
        padded = [list(prompt.suffix_ids) + [0] * (longest - len(prompt.suffix_ids)) for _, prompt in admitted]
        rows = torch.tensor([slot for slot, _ in admitted], device=self._device)
        lengths_R = torch.tensor([len(prompt.suffix_ids) for _, prompt in admitted], device=self._device)
        tokens_RS = torch.tensor(padded, device=self._device)
        logits_RV = self._network.prefill(self._cache, self._prefix, rows, tokens_RS, lengths_R)
        fresh = BeamState.empty(len(admitted), self._plan, self._device)
        self._search.advance(fresh, logits_RV[:, None])
        self._state.put(rows, fresh)

    def _decode(self) -> None:
        """Decode one token for each beam of each row of the batch."""
        assert self._prefix is not None
        batch = len(self._rows)
        state = self._state.rows(slice(0, batch))
        fed_B = (state.length_B - 1).clamp(min=0)
        tokens_BK = state.tokens_BKT.gather(2, fed_B[:, None, None].expand(-1, self._plan.num_beams, 1))[:, :, 0]
        self._ends = [min(end + self._plan.num_beams, self._cache.columns) for end in self._ends]
        logits_BKV = self._network.decode(self._cache, self._prefix, tokens_BK, fed_B, self._ends)
        parent_BK = self._search.advance(state, logits_BKV)
        self._cache.reorder(parent_BK, state.done_B, max(self._ends))

    def _take_finished(self) -> list[Generation]:
        """Return the generations of the rows that are done, and free their slots."""
        batch = len(self._rows)
        state = self._state.rows(slice(0, batch))
        self._ends = self._cache.ends(batch, max(self._ends)).tolist()
        done = [i for i, flag in enumerate(state.done_B.tolist()) if flag and self._rows[i] is not None]
        if not done:
            return []
        index = torch.tensor(done, device=self._device)
        ended = state.rows(index)
        finished = [
            self._generation(self._rows[slot], tokens, length, eos, score, failed)
            for slot, tokens, length, eos, score, failed in zip(
                done,
                ended.best_tokens_BT.tolist(),
                ended.best_length_B.tolist(),
                ended.best_eos_B.tolist(),
                ended.best_score_B.tolist(),
                ended.failed_B.tolist(),
                strict=True,
            )
        ]
        for slot, generation in zip(done, finished, strict=True):
            self._rows[slot] = None
            if generation.finish is FinishReason.ERROR:
                self._cache.clear_row(slot)
        if self._shrinks and len(self._queue) == 0:
            self._arrange([])
        return finished

    def _generation(
        self, prompt: Prompt | None, tokens: list[int], length: int, eos: bool, score: float, failed: bool
    ) -> Generation:
        assert prompt is not None
        if failed:
            return Generation.failed(prompt, "the model gave NaN or infinite scores")
        return Generation(
            id=prompt.id,
            text=self._loaded.decode(tokens[:length]),
            finish=FinishReason.EOS if eos else FinishReason.LENGTH,
            prompt_tokens=prompt.tokens,
            output_tokens=length,
            score=score,
        )
