"""The Triton decode attention against its plain-torch twin, in Triton's interpreter on the CPU or on a GPU."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import beam_engine, drain, random_prompts, texts, tiny_llama

from capsfusion_ray.config import DecodeConfig
from capsfusion_ray.engines.beam.attention import decode_attention
from capsfusion_ray.engines.beam.attention_triton import decode_attention_triton
from capsfusion_ray.errors import ConfigError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("heads", "group", "beams", "size", "prefix"),
    [(2, 1, 3, 16, 5), (1, 4, 3, 32, 70), (2, 2, 1, 16, 0), (1, 8, 5, 16, 64)],
)
def test_the_kernel_gives_what_its_plain_torch_twin_gives(heads, group, beams, size, prefix):
    torch.manual_seed(0)
    rows, columns = 3, 111

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE)

    q = randn(rows, heads, group, beams, size)
    prefix_k, prefix_v = randn(heads, prefix, size), randn(heads, prefix, size)
    keys, values = randn(rows + 1, heads, columns, size), randn(rows + 1, heads, columns, size)
    suffix, end = torch.tensor([[0], [20], [9]], device=DEVICE), torch.tensor([1, columns, 66], device=DEVICE)
    column = torch.arange(columns, device=DEVICE)
    visible = torch.zeros(rows + 1, beams, columns, dtype=torch.bool, device=DEVICE)
    ancestry = torch.rand(rows, beams, columns, device=DEVICE) < 1 / beams
    visible[:rows] = ((column < suffix)[:, None] | ancestry) & (column < end[:, None])[:, None]
    visible[:rows, :, 0] |= prefix == 0  # as in the engine: every beam sees its own last token at least
    mask = torch.zeros(rows, beams, columns, device=DEVICE).masked_fill_(~visible[:rows], float("-inf"))

    want = decode_attention(q, prefix_k, prefix_v, keys[:rows], values[:rows], mask)
    got = decode_attention_triton(q, prefix_k, prefix_v, keys, values, visible, end)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_engine_writes_the_same_captions_through_the_kernel(beams):
    """Whole captions, with refill and rows at mixed depths: what a wrong end column or mask would change."""
    model = tiny_llama(7, dtype=torch.float32, hidden_size=64).to(DEVICE)
    prompts = random_prompts(random.Random(beams), 7)
    decode = DecodeConfig(num_beams=beams, max_new_tokens=10)
    written = {
        attention: texts(drain(beam_engine(model, decode, slots=3, attention=attention), prompts))
        for attention in ("torch", "triton")
    }
    assert written["triton"] == written["torch"]
    assert len(set(written["torch"].values())) > 1


def test_heads_the_kernel_cannot_run_are_refused_by_name():
    model = tiny_llama(1, dtype=torch.float32)  # heads of 8
    with pytest.raises(ConfigError, match="heads have 8 channels"):
        beam_engine(model, DecodeConfig(), attention="triton")
