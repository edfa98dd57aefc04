"""Runs any causal language model with HF's `generate`, in static batches. Slower than `beam`, but it runs all models."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.core.types import FinishReason, Generation, Prompt
from capsfusion_ray.engines.base import Occupancy, prompt_fault
from capsfusion_ray.engines.beam.search import block_repeats
from capsfusion_ray.engines.loading import LoadedModel, load_model
from capsfusion_ray.errors import ConfigError, EngineError


class TransformersEngine:
    """Implements engines.base.Engine with one `generate` call per step, for `engine.batch_size` prompts.

    Raises ConfigError for several beams with decode.scoring=reference. transformers 5.x divides the score of a hypothesis
    by its generated length and cannot be told to use the padded full length of 4.28.1, so its captions would differ.
    """

    def __init__(self, engine: EngineConfig, decode: DecodeConfig) -> None:
        _refuse_reference_beams(decode)
        if engine.threads is not None:
            torch.set_num_threads(engine.threads)
        self._start(load_model(engine), engine, decode)

    @classmethod
    def from_loaded(cls, loaded: LoadedModel, engine: EngineConfig, decode: DecodeConfig) -> TransformersEngine:
        """Build an engine for a model that is already in memory."""
        _refuse_reference_beams(decode)
        built = cls.__new__(cls)
        built._start(loaded, engine, decode)
        return built

    def _start(self, loaded: LoadedModel, engine: EngineConfig, decode: DecodeConfig) -> None:
        self._loaded = loaded
        self._engine = engine
        self._decode = decode.resolved()
        pad, rows = loaded.tokenizer.pad_token_id, loaded.model.get_input_embeddings().weight.shape[0]
        # Padding is masked, so any id with a row in the embedding will do. Many LLaMA tokenizers have an added pad token
        # that the weights lack.
        self._pad_id = loaded.eos_ids[0] if pad is None or pad >= rows else pad
        self._queue: deque[Prompt] = deque()
        self._failed: list[Generation] = []

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._loaded.encode(list(texts))

    @property
    def unfinished(self) -> int:
        return len(self._queue) + len(self._failed)

    @property
    def occupancy(self) -> Occupancy:
        """The size of the next batch. A batch is never in progress between two steps."""
        return Occupancy(min(len(self._queue), self._engine.batch_size), self._engine.batch_size)

    def submit(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if error := prompt_fault(prompt, self._engine.max_prompt_tokens):
                self._failed.append(Generation.failed(prompt, error))
            else:
                self._queue.append(prompt)

    @torch.inference_mode()
    def step(self) -> list[Generation]:
        """Generate one batch, in the order in which prompts were submitted."""
        finished, self._failed = self._failed, []
        batch = [self._queue.popleft() for _ in range(min(self._engine.batch_size, len(self._queue)))]
        if not batch:
            return finished
        ids = [list(prompt.prefix_ids + prompt.suffix_ids) for prompt in batch]
        width = max(map(len, ids))
        device = self._loaded.device
        tokens_BS = torch.tensor([[self._pad_id] * (width - len(row)) + row for row in ids], device=device)
        mask_BS = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
        watch = _Watch(len(batch), width, self._decode.no_repeat_ngram)
        try:
            out_BS: Tensor = self._loaded.model.generate(
                tokens_BS,
                attention_mask=mask_BS,
                num_beams=self._decode.num_beams,
                max_new_tokens=self._decode.max_new_tokens,
                length_penalty=self._decode.length_penalty,
                do_sample=False,
                pad_token_id=self._pad_id,
                eos_token_id=list(self._loaded.eos_ids),
                logits_processor=[watch],
            )
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"engine.batch_size={len(batch)}: out of memory ({error}); set engine.batch_size to a lower number"
            ) from error
        for prompt, new_ids, failed in zip(batch, out_BS[:, width:].tolist(), watch.failed_rows(), strict=True):
            finished.append(
                Generation.failed(prompt, "the model gave NaN scores") if failed else self._generation(prompt, new_ids)
            )
        return finished

    def _generation(self, prompt: Prompt, new_ids: list[int]) -> Generation:
        end = next((i for i, token in enumerate(new_ids) if token in self._loaded.eos_ids), None)
        ids = new_ids if end is None else new_ids[:end]
        return Generation(
            id=prompt.id,
            text=self._loaded.decode(ids),
            finish=FinishReason.LENGTH if end is None else FinishReason.EOS,
            prompt_tokens=prompt.tokens,
            output_tokens=len(ids),
        )


class _Watch:
    """A LogitsProcessor of HF. It records the rows with NaN scores, and blocks repeated n-grams of the generated text."""

    def __init__(self, rows: int, prompt_columns: int, no_repeat_ngram: int) -> None:
        self._rows = rows
        self._prompt_columns = prompt_columns
        self._no_repeat_ngram = no_repeat_ngram
        self._failed_B: Tensor | None = None

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """Process the scores [B*K, V] of the token after `tokens` [B*K, columns so far]. Rows that are done are included."""
        failed_B = scores.view(self._rows, -1).isnan().any(dim=1)
        self._failed_B = failed_B if self._failed_B is None else self._failed_B | failed_B
        if self._no_repeat_ngram:
            new = tokens[:, self._prompt_columns :].view(self._rows, scores.shape[0] // self._rows, -1)
            length_B = torch.full((self._rows,), new.shape[2], device=tokens.device)
            scores = scores.clone()
            block_repeats(scores.view(self._rows, -1, scores.shape[1]), new, length_B, self._no_repeat_ngram)
        return scores

    def failed_rows(self) -> list[bool]:
        failed: list[bool] = [] if self._failed_B is None else self._failed_B.tolist()
        return failed


def _refuse_reference_beams(decode: DecodeConfig) -> None:
    if decode.resolved().scoring == "reference" and decode.num_beams > 1:
        raise ConfigError(
            f"decode.scoring='reference' with decode.num_beams={decode.num_beams}: engine.kind=transformers cannot score as "
            "transformers 4.28.1 did; use engine.kind=beam, or decode.scoring=transformers, or decode.num_beams=1"
        )
