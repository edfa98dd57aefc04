"""Pure pieces of the beam arithmetic; the whole of it is compared with transformers elsewhere."""

from __future__ import annotations

import pytest
import torch

from capsfusion_ray.engines.beam.search import BLOCK, best_continuations


@pytest.mark.parametrize("vocabulary", [7, BLOCK, BLOCK + 1, 5 * BLOCK - 1, 40 * BLOCK])
@pytest.mark.parametrize(("beams", "queries", "candidates"), [(3, 3, 6), (3, 1, 6), (2, 2, 14), (8, 8, 24)])
def test_the_best_of_the_blocks_are_the_best_of_all(vocabulary, beams, queries, candidates):
    candidates = min(candidates, queries * vocabulary)
    torch.manual_seed(vocabulary + beams)
    logprobs = torch.randn(5, queries, vocabulary).log_softmax(dim=-1)
    logprobs[1, :, ::2] = float("-inf")  # as a blocked n-gram leaves them
    scores = torch.randn(5, beams) * 10
    want, flat = (logprobs + scores[:, :queries, None]).flatten(1).topk(candidates, dim=1)
    found, beam, token = best_continuations(logprobs, scores, candidates)
    assert torch.equal(found, want)
    allowed = want.isfinite()
    assert torch.equal((beam * vocabulary + token)[allowed], flat[allowed])
    assert (token < vocabulary).all()
    assert (beam < queries).all()


def test_a_number_that_is_none_comes_first():
    logprobs = torch.randn(2, 3, 100)
    logprobs[1, 2, 70] = float("nan")
    found, _, _ = best_continuations(logprobs, torch.zeros(2, 3), 6)
    assert found[0, 0].isfinite()
    assert found[1, 0].isnan()
