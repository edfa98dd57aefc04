"""Small random models for the engine tests, and HF's generate as the oracle. No downloads, no files."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.core.types import Generation, Prompt
from capsfusion_ray.engines.base import Engine
from capsfusion_ray.engines.beam.engine import BeamEngine
from capsfusion_ray.engines.loading import LoadedModel

EOS = 1
VOCABULARY = 60


class IdTokenizer:
    """Writes token ids as their numbers, so that a test compares tokens, not text."""

    pad_token_id = 2
    eos_token_id = EOS

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))


def tiny_llama(
    seed: int, eos_weight: float = 2.0, dtype: torch.dtype = torch.float64, **config: Any
) -> LlamaForCausalLM:
    """A random model with peaked scores, whose captions end at varied lengths.

    float64 by default: a random model has near ties that two correct float32 programs break differently.
    """
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(**(shape | config), bos_token_id=0, eos_token_id=EOS, pad_token_id=2, initializer_range=0.3)
    )
    raise_eos(model, eos_weight)
    return model.to(dtype).eval()


def raise_eos(model: Any, weight: float) -> None:
    """Make the EOS about as likely as other tokens are, at places that depend on the text."""
    with torch.no_grad():
        head = model.lm_head.weight
        head[EOS] += head[torch.randperm(head.shape[0])[:6]].mean(0) * weight


def random_prompts(rng: random.Random, n: int, prefix: int = 18, longest: int = 9) -> list[Prompt]:
    constant = tuple(rng.randrange(3, VOCABULARY) for _ in range(prefix))
    return [
        Prompt(
            f"row-{i}",
            "",
            "",
            "",
            constant,
            tuple(rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, longest))),
        )
        for i in range(n)
    ]


def loaded(model: Any, eos_ids: tuple[int, ...] = (EOS,)) -> LoadedModel:
    return LoadedModel(copy.deepcopy(model), IdTokenizer(), eos_ids, "tiny")


def beam_engine(
    model: Any,
    decode: DecodeConfig,
    slots: int = 4,
    max_prompt_tokens: int = 32,
    attention: str = "auto",
    **kwargs: Any,
) -> BeamEngine:
    engine = EngineConfig(slots=slots, max_prompt_tokens=max_prompt_tokens, attention=attention)
    return BeamEngine(loaded(model, **kwargs), engine, decode)


def drain(engine: Engine, prompts: Sequence[Prompt]) -> dict[str, Generation]:
    """Submit everything at once, step until nothing is left."""
    engine.submit(prompts)
    finished: dict[str, Generation] = {}
    while engine.unfinished:
        for generation in engine.step():
            assert generation.id not in finished
            finished[generation.id] = generation
    return finished


def texts(finished: dict[str, Generation]) -> dict[str, str]:
    assert all(generation.error == "" for generation in finished.values())
    return {name: generation.text for name, generation in finished.items()}


def hf_texts(
    model: Any, prompts: Sequence[Prompt], decode: DecodeConfig, eos_ids: Sequence[int] = (EOS,), **more: Any
) -> dict[str, str]:
    """What HF's generate writes for the prompts, left-padded into one batch, as IdTokenizer writes it."""
    ids = [list(prompt.prefix_ids + prompt.suffix_ids) for prompt in prompts]
    width = max(map(len, ids))
    out = model.generate(
        torch.tensor([[IdTokenizer.pad_token_id] * (width - len(row)) + row for row in ids], device=model.device),
        attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=model.device),
        num_beams=decode.num_beams,
        max_new_tokens=decode.max_new_tokens,
        length_penalty=decode.resolved().length_penalty,
        do_sample=False,
        eos_token_id=list(eos_ids),
        **more,
    )[:, width:].tolist()
    written = {}
    for prompt, row in zip(prompts, out, strict=True):
        end = next((i for i, token in enumerate(row) if token in eos_ids), len(row))
        written[prompt.id] = " ".join(map(str, row[:end]))
    return written
