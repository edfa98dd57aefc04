"""Batches: as many as steps, whatever is left out, and the same ones for the same seed."""

import dataclasses
import os
import subprocess
import sys

import pytest

from capsfusion_ray.errors import SourceError
from capsfusion_ray.training.augment import Banks
from capsfusion_ray.training.batches import MAX_NEW_TOKENS, MAX_PROMPT, POOL_BATCHES, pool
from capsfusion_ray.training.config import AugmentConfig, OptimConfig, ReinforceConfig, TrainConfig
from capsfusion_ray.training.triples import Triple

CFG = TrainConfig(
    augment=AugmentConfig(copy_share=0.0, copy_only_steps=0, copy_fade_steps=0), optim=OptimConfig(batch_triples=4)
)


def encoder(triple):
    """A token a word; the loss counts the target's alone."""
    source, target = triple.raw.split() + triple.synthetic.split(), triple.fused.split()
    return list(range(len(source) + len(target))), [0.0] * len(source) + [1.0] * len(target)


def triples(long_share):
    """That share of the fused captions is longer than the decoder writes."""
    made = []
    for i in range(100):
        words = f"word{i} " * (MAX_NEW_TOKENS * 2 if i < long_share * 100 else 9)
        made.append(Triple(f"raw number {i}", f"a picture of word{i}", f"A picture of {words}."))
    return made


@pytest.mark.parametrize("long_share", [0.0, 0.2, 0.6])
def test_a_pool_has_a_batch_a_step_however_many_captions_are_too_long(long_share):
    rows = triples(long_share)
    for number in range(5):
        batches = pool(number, rows, Banks.collect(rows, 1), encoder, CFG, 0)
        assert len(batches) == POOL_BATCHES
        assert all((batch.weights_TL.sum(dim=1) <= MAX_NEW_TOKENS).all() for batch in batches)


def test_only_captions_that_are_too_long_are_refused():
    rows = triples(1.0)
    as_they_are = dataclasses.replace(CFG, augment=dataclasses.replace(CFG.augment, rewrite_share=0.0))
    with pytest.raises(SourceError, match="at most"):
        pool(1, rows, Banks.collect(rows, 1), encoder, as_they_are, 0)


def test_the_same_seed_draws_the_same_batches_in_another_process():
    """Strings hash differently in every process: a walk over a set of them would draw other batches after a kill."""
    code = "from test_batches import *; rows = triples(0.1); batches = pool(3, rows, Banks.collect(rows, 1), spelled, CFG, 0); "
    code += "print([batch.ids_TL.tolist() for batch in batches])"
    drawn = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.path.dirname(__file__)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) > 1000


def spelled(triple):
    """Token ids that tell the words: their letters."""
    text = f"{triple.raw} {triple.synthetic} {triple.fused}".encode()
    return list(text), [0.0] * (len(text) - 1) + [1.0]


def test_without_a_curriculum_the_first_batches_are_real_captions():
    rows = triples(0.0)
    plain = dataclasses.replace(
        CFG, augment=dataclasses.replace(CFG.augment, rewrite_share=0.0, phrase_share=0.0, noise_share=0.0)
    )
    drawn = [triple for batch in pool(0, rows, Banks.collect(rows, 1), encoder, plain, 0) for triple in batch.triples]
    assert set(drawn) <= set(rows)


def test_a_self_critical_pool_has_prompts_to_sample_from_however_small_its_batches():
    """A batch of one whose prompt is over the budget would stop the run at that step, at every try."""
    rows = [dataclasses.replace(t, raw=" ".join([t.raw] * (120 if i % 3 else 1))) for i, t in enumerate(triples(0.0))]
    one = dataclasses.replace(CFG, optim=OptimConfig(batch_triples=1), reinforce=ReinforceConfig(samples=2))
    for number in range(5):
        batches = pool(number, rows, Banks.collect(rows, 1), Words(), one, 0)
        assert len(batches) == POOL_BATCHES
        assert all(len(Words().prompt(triple)) <= MAX_PROMPT for batch in batches for triple in batch.triples)


class Words:
    """As `encoder`, with the prompt told apart."""

    end_id = 0
    __call__ = staticmethod(encoder)

    def prompt(self, triple):
        return list(range(len(triple.raw.split()) + len(triple.synthetic.split())))
