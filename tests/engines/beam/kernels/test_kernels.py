"""Kernels against their plain-torch twins: Triton's attention (in its interpreter, or on a GPU), and numba's on the CPU."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import beam_engine, drain, random_prompts, texts, tiny_llama

from capsfusion_ray.config import DecodeConfig
from capsfusion_ray.engines.beam.cache import write_columns
from capsfusion_ray.engines.beam.kernels.attention import decode_attention
from capsfusion_ray.engines.beam.kernels.attention_numba import decode_attention_numba, write_columns_numba
from capsfusion_ray.engines.beam.kernels.attention_triton import decode_attention_triton
from capsfusion_ray.engines.beam.kernels.elementwise import rms_norm, rotate
from capsfusion_ray.engines.beam.kernels.elementwise_numba import rms_norm_numba, rotate_numba
from capsfusion_ray.engines.beam.kernels.linear_onednn import has_onednn, linear_onednn
from capsfusion_ray.errors import ConfigError

KERNELS = {"triton": decode_attention_triton, "numba": decode_attention_numba}
DEVICES = {"triton": "cuda" if torch.cuda.is_available() else "cpu", "numba": "cpu"}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("heads", "group", "beams", "size", "prefix"),
    [(2, 1, 3, 16, 5), (1, 4, 3, 32, 70), (2, 2, 1, 16, 0), (1, 8, 5, 16, 64)],
)
def test_the_kernel_gives_what_its_plain_torch_twin_gives(kernel, heads, group, beams, size, prefix):
    torch.manual_seed(0)
    device = DEVICES[kernel]
    rows, columns = 3, 111

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    q = randn(rows, heads, group, beams, size)
    prefix_k, prefix_v = randn(heads, prefix, size), randn(heads, prefix, size)
    keys, values = randn(rows + 1, heads, columns, size), randn(rows + 1, heads, columns, size)
    suffix, end = torch.tensor([[0], [20], [9]], device=device), torch.tensor([1, columns, 66], device=device)
    column = torch.arange(columns, device=device)
    visible = torch.zeros(rows + 1, beams, columns, dtype=torch.bool, device=device)
    ancestry = torch.rand(rows, beams, columns, device=device) < 1 / beams
    visible[:rows] = ((column < suffix)[:, None] | ancestry) & (column < end[:, None])[:, None]
    visible[:rows, :, 0] |= prefix == 0  # as in the engine: every beam sees its own last token at least
    mask = torch.zeros(rows, beams, columns, device=device).masked_fill_(~visible[:rows], float("-inf"))

    want = decode_attention(q, prefix_k, prefix_v, keys[:rows], values[:rows], mask)
    got = KERNELS[kernel](q, prefix_k, prefix_v, keys, values, visible, end)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_written_columns_are_those_that_torch_writes():
    torch.manual_seed(0)
    key, value = (
        torch.randn(3, 2, 4, 8),
        torch.randn(3, 2, 8, 8).transpose(2, 3)[..., :4, :],
    )  # not contiguous, as in the engine
    column = torch.tensor([[0, 4], [2, 1], [6, 5]])
    mine, want = ([torch.zeros(5, 4, 7, 8) for _ in range(2)] for _ in range(2))
    write_columns_numba(key, value, column, *mine)
    write_columns(key, value, column, *want)
    assert all(torch.equal(a, b) for a, b in zip(mine, want, strict=True))
    assert mine[0].any()


def test_tokens_are_normed_and_rotated_as_torch_does_it():
    torch.manual_seed(0)
    x, weight = torch.randn(4, 3, 2, 20).transpose(1, 2), torch.randn(20)  # not contiguous
    torch.testing.assert_close(rms_norm_numba(x, weight, 1e-5), rms_norm(x, weight, 1e-5))
    assert rms_norm_numba(x.fill_(float("nan")), weight, 1e-5).isnan().all()
    qkv, cos, sin = torch.randn(5, 9, 8), torch.randn(5, 8), torch.randn(5, 8)
    want, value = rotate(qkv[:, :6], cos, sin), qkv[:, 6:].clone()
    torch.testing.assert_close(rotate_numba(qkv[:, :6], cos, sin), want)
    assert torch.equal(qkv[:, 6:], value)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("beams", [1, 3])
def test_the_engine_writes_the_same_captions_through_the_kernel(kernel, beams):
    """Whole captions, with refill and rows at mixed depths: what a wrong end column or mask would change."""
    model = tiny_llama(7, dtype=torch.float32, hidden_size=64).to(DEVICES[kernel])
    prompts = random_prompts(random.Random(beams), 7)
    decode = DecodeConfig(num_beams=beams, max_new_tokens=10)
    written = {
        attention: texts(drain(beam_engine(model, decode, slots=3, attention=attention), prompts))
        for attention in ("torch", kernel)
    }
    assert written[kernel] == written["torch"]
    assert len(set(written["torch"].values())) > 1


def test_what_a_kernel_cannot_run_is_refused_by_name():
    model = tiny_llama(1, dtype=torch.float32).to(DEVICES["triton"])  # heads of 8
    with pytest.raises(ConfigError, match="heads have 8 channels"):
        beam_engine(model, DecodeConfig(), attention="triton")
    with pytest.raises(ConfigError, match=r"float32 on a CPU, and this model is in torch\.bfloat16"):
        beam_engine(tiny_llama(1, dtype=torch.bfloat16), DecodeConfig(), attention="numba")


@pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN product")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(0, 24), (1, 24), (7, 24), (5, 3, 24)], ids=str)
def test_onednn_s_product_is_the_product(shape, bias):
    torch.manual_seed(0)
    x, weight, b = torch.randn(shape), torch.randn(40, 24), torch.randn(40) if bias else None
    with torch.inference_mode():
        torch.testing.assert_close(linear_onednn(x, weight, b), torch.nn.functional.linear(x, weight, b))
