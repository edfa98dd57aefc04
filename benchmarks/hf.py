"""HF's `generate` in static batches. bench_engine.py compares speeds with it, check_exactness.py compares captions."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from capsfusion_ray.core.prompt import PromptBuilder
from capsfusion_ray.core.types import CaptionPair, Prompt
from capsfusion_ray.engines.loading import LoadedModel


class Ids:
    """Stands in for the tokenizer's decode: a caption is its token ids."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))


def read_pairs(path: str, rows: int) -> list[CaptionPair]:
    """Pairs of a JSON array or of JSON lines, in file order; from the start again where the file is too short."""
    text = Path(path).read_text(encoding="utf-8")
    records = (
        json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    )
    keys = ("laion_2b", "laion_coco") if "laion_2b" in records[0] else ("raw", "synthetic")
    usable = [record for record in records if record.get(keys[0]) and record.get(keys[1])]
    if not usable:
        raise SystemExit(f"--pairs {path}: no record has both {keys[0]} and {keys[1]}")
    return [CaptionPair(str(i), *(usable[i % len(usable)][key] for key in keys)) for i in range(rows)]


def build_prompts(loaded: LoadedModel, pairs: Sequence[CaptionPair], template: str, max_tokens: int) -> list[Prompt]:
    """The prompts as the job builds them; pairs that no prompt of `max_tokens` holds are left out."""
    builder = PromptBuilder(template, lambda texts: loaded.encode(list(texts)), max_tokens)
    return [prompt for prompt in builder.build(list(pairs)) if isinstance(prompt, Prompt)]


def generate_batch(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    *,
    beams: int,
    max_new_tokens: int,
    exact_tokens: bool = False,
    pad_to: int = 0,
    prefix_kv: Any = None,
    penalty: float = 1.0,
) -> list[list[int]]:
    """Generated ids of each prompt, without the EOS, from one call of `generate`.

    `pad_to` pads every prompt on the left to that many tokens, as the reference does. `prefix_kv` is the cache of the
    prompts' common prefix (`prefix_cache`): only the suffixes are computed then. `exact_tokens` lets no caption end early.
    """
    eos = list(loaded.eos_ids)
    pad = loaded.tokenizer.pad_token_id if loaded.tokenizer.pad_token_id is not None else eos[0]
    prefix = prompts[0].prefix_ids
    width = max(max(len(prompt.suffix_ids) for prompt in prompts), pad_to - len(prefix))
    ids, mask = [], []
    for prompt in prompts:
        gap, length = width - len(prompt.suffix_ids), len(prompt.suffix_ids)
        if prefix_kv is None:  # padding on the left of everything
            ids.append([pad] * gap + list(prefix + prompt.suffix_ids))
            mask.append([0] * gap + [1] * (len(prefix) + length))
        else:  # padding between the cached prefix and the suffix; positions follow the mask
            ids.append(list(prefix) + [pad] * gap + list(prompt.suffix_ids))
            mask.append([1] * len(prefix) + [0] * gap + [1] * length)
    more: dict[str, Any] = {"min_new_tokens": max_new_tokens} if exact_tokens else {}
    if prefix_kv is not None:
        more["past_key_values"] = copied = copy.deepcopy(prefix_kv)
        copied.batch_repeat_interleave(len(prompts) * beams)
    tokens = torch.tensor(ids, device=loaded.device)
    out = loaded.model.generate(
        tokens,
        attention_mask=torch.tensor(mask, device=loaded.device),
        num_beams=beams,
        do_sample=False,
        length_penalty=penalty,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=eos,
        **more,
    )[:, tokens.shape[1] :].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in eos), len(row))] for row in out]


def prefix_cache(loaded: LoadedModel, prefix: Sequence[int]) -> DynamicCache:
    """Keys and values of a constant prefix."""
    tokens = torch.tensor([list(prefix)], device=loaded.device)
    cache: DynamicCache = loaded.model(tokens, use_cache=True).past_key_values
    return cache
