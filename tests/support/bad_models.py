"""Folders of tiny models to spoil, and a payload that leaves a trace when it is run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from tiny import EOS, tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from capsfusion_ray.config import DecodeConfig, EngineConfig

WORDS = 60  # rows of the tiny model's vocabulary
SLOTS = 16  # as many as run.engine_loop.FIRST_CAPTIONS, by which an actor judges a model
DECODE = DecodeConfig(num_beams=2, max_new_tokens=4, scoring="transformers")


def save(folder: Path, model: Any, words: int = WORDS, **tokens: str) -> Path:
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(words)}, unk_token="w3"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"w{EOS}", unk_token="w3", **tokens).save_pretrained(
        folder
    )
    return folder


def llama(eos_weight: float = 2.0) -> Any:
    return tiny_llama(1, eos_weight, dtype=torch.float32)


def config(folder: Path, kind: str = "beam") -> EngineConfig:
    """A config with one thread, so that there is one beam engine. Several engines may round a score's last digit differently."""
    return EngineConfig(
        kind=kind,
        model=str(folder),
        device="cpu",
        dtype="float32",
        slots=SLOTS,
        batch_size=SLOTS,
        threads=1,
    )


class Trojan:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self._mark),)
