"""The Triton decode attention against its plain-torch twin, in Triton's interpreter on the CPU or on a GPU."""

from __future__ import annotations

import importlib.util
import os
import random

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: the GPU kernel is NOT checked in this run", allow_module_level=True)

from tiny import beam_engine, drain, random_prompts, texts, tiny_llama  # noqa: E402

from capsfusion_ray.config import DecodeConfig  # noqa: E402
from capsfusion_ray.engines.beam.attention import decode_attention  # noqa: E402
from capsfusion_ray.engines.beam.attention_triton import decode_attention_triton  # noqa: E402
from capsfusion_ray.errors import ConfigError  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"


@pytest.mark.parametrize(
    ("heads", "group", "beams", "size", "prefix"),
    [(2, 1, 3, 16, 5), (1, 4, 3, 32, 70), (2, 2, 1, 16, 0), (1, 8, 5, 16, 64)],
)
def test_the_kernel_gives_what_its_plain_torch_twin_gives(heads, group, beams, size, prefix):
    torch.manual_seed(0)
    rows, suffix_columns, steps = 3, 21, 30
    columns = suffix_columns + steps * beams

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE)

    q = randn(rows, heads, group, beams, size)
    prefix_k, prefix_v = randn(heads, prefix, size), randn(heads, prefix, size)
    keys, values = randn(rows + 1, heads, columns, size), randn(rows + 1, heads, columns, size)
    start = torch.tensor([0, 20, 9], device=DEVICE)
    end = suffix_columns + torch.tensor([1, steps, 17], device=DEVICE) * beams
    column = torch.arange(columns, device=DEVICE)
    suffix = (column >= start[:, None]) & (column < suffix_columns)
    generated = (column >= suffix_columns) & (column < end[:, None])
    visible = torch.zeros(rows + 1, beams, columns, dtype=torch.bool, device=DEVICE)
    ancestry = torch.rand(rows, beams, columns, device=DEVICE) < 1 / beams
    visible[:rows] = suffix[:, None] | (generated[:, None] & ancestry)
    mask = torch.zeros(rows, beams, columns, device=DEVICE).masked_fill_(~visible[:rows], float("-inf"))

    want = decode_attention(q, prefix_k, prefix_v, keys[:rows], values[:rows], mask)
    got = decode_attention_triton(q, prefix_k, prefix_v, keys, values, visible, start, end)
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
