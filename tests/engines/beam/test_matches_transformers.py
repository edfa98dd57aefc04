"""The beam engine against HF's generate (the installed 5.x), token for token, on small random models."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import EOS, VOCABULARY, beam_engine, drain, hf_texts, raise_eos, random_prompts, texts, tiny_llama
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from capsfusion_ray.config import DecodeConfig


def decoding(beams: int, cap: int, penalty: float = 1.0, ngram: int | None = None) -> DecodeConfig:
    return DecodeConfig(
        num_beams=beams, max_new_tokens=cap, scoring="transformers", length_penalty=penalty, no_repeat_ngram=ngram
    )


@pytest.mark.parametrize(
    ("beams", "cap", "penalty", "slots", "prefix", "heads"),
    [
        (1, 12, 1.0, 3, 5, 2),
        (2, 20, 1.0, 1, 5, 4),
        (3, 30, 1.0, 4, 7, 1),
        (3, 12, 0.0, 2, 0, 2),
        (3, 15, 2.0, 8, 1, 2),
        (3, 12, -0.5, 3, 3, 4),
        (5, 12, 0.5, 3, 5, 2),
        (8, 6, 1.0, 4, 5, 2),
        (3, 1, 1.0, 4, 5, 2),
        (2, 2, 1.0, 4, 5, 2),
    ],
)
def test_beam_engine_matches_transformers_token_for_token(beams, cap, penalty, slots, prefix, heads):
    rng = random.Random(beams * 100 + cap)
    model = tiny_llama(seed=cap, eos_weight=rng.choice([1.0, 2.0, 3.0]), num_key_value_heads=heads)
    prompts = random_prompts(rng, 8, prefix=prefix)
    decode = decoding(beams, cap, penalty)
    assert texts(drain(beam_engine(model, decode, slots), prompts)) == hf_texts(model, prompts, decode)


ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 5e5,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4},
}


@pytest.mark.parametrize("shape", [*ROPES, "tied", "biased", "wide heads", "mistral", "qwen2"])
def test_every_supported_shape_of_model_matches(shape):
    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    small |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": EOS,
        "pad_token_id": 2,
        "bos_token_id": 0,
    }
    torch.manual_seed(0)
    if shape in ROPES:
        model = tiny_llama(3, rope_parameters=ROPES[shape])
    elif shape == "tied":
        model = tiny_llama(4, tie_word_embeddings=True)
    elif shape == "biased":
        model = tiny_llama(5, attention_bias=True, mlp_bias=True)
    elif shape == "wide heads":
        model = tiny_llama(6, head_dim=16)
    elif shape == "mistral":
        model = MistralForCausalLM(MistralConfig(**small, sliding_window=4096, initializer_range=0.3)).double().eval()
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**small, initializer_range=0.3)).double().eval()
    if shape in ("mistral", "qwen2", "biased"):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.5)
        raise_eos(model, 1.0)
    prompts = random_prompts(random.Random(1), 5)
    decode = decoding(3, 10)
    assert texts(drain(beam_engine(model, decode, 2), prompts)) == hf_texts(model, prompts, decode)


def test_a_list_of_eos_ids_ends_captions_as_in_transformers():
    model = tiny_llama(7)
    prompts = random_prompts(random.Random(2), 6)
    decode = decoding(3, 12)
    ours = drain(beam_engine(model, decode, 3, eos_ids=(EOS, 9, 11)), prompts)
    assert texts(ours) == hf_texts(model, prompts, decode, eos_ids=(EOS, 9, 11))


class GeneratedNgrams:
    """The oracle for decode.no_repeat_ngram: a plain loop over the generated tokens of each beam."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.prompt: int | None = None

    def __call__(self, tokens, scores):
        if self.prompt is None or tokens.shape[1] <= self.prompt:
            self.prompt = tokens.shape[1]
        scores = scores.clone()
        for row, ids in enumerate(tokens[:, self.prompt :].tolist()):
            tail = ids[len(ids) - self.size + 1 :]
            for start in range(len(ids) - self.size + 1):
                if len(ids) >= self.size - 1 and ids[start : start + self.size - 1] == tail:
                    scores[row, ids[start + self.size - 1]] = float("-inf")
        return scores


@pytest.mark.parametrize(("beams", "size"), [(1, 2), (3, 2), (3, 3), (2, 1)])
def test_repeated_ngrams_are_blocked_in_the_generated_text_only(beams, size):
    model = tiny_llama(8, eos_weight=0.0)  # without an EOS a random model soon repeats itself
    prompts = random_prompts(random.Random(3), 4)
    decode = decoding(beams, 20, ngram=size)
    ours = texts(drain(beam_engine(model, decode, 2), prompts))
    want = hf_texts(model, prompts, decode, logits_processor=[GeneratedNgrams(size)])
    assert ours == want
    free = texts(drain(beam_engine(model, decoding(beams, 20), 2), prompts))
    assert free != ours
