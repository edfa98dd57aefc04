"""Rewritten triples: copying stays possible, and is what is asked for."""

import random

import pytest

from capsfusion_ray.training.augment import Banks, _swap_phrase, add_noise, copy_task, draw, rewrite, words
from capsfusion_ray.training.config import AugmentConfig
from capsfusion_ray.training.triples import Triple, is_sound


@pytest.fixture(scope="module")
def triples(rows):
    return [Triple(*row.values()) for row in rows]


@pytest.fixture(scope="module")
def banks(triples):
    return Banks.collect(triples, seed=1)


def test_a_word_replaced_in_a_source_is_replaced_in_the_target_alike(triples, banks):
    cfg = AugmentConfig(phrase_share=0.0)
    changed = 0
    for i, triple in enumerate(triples):
        new = rewrite(triple, banks, cfg, random.Random(i))
        sources = {w.lower() for w in words(f"{new.raw} {new.synthetic}")}
        old_sources = {w.lower() for w in words(f"{triple.raw} {triple.synthetic}")}
        for old, word in zip(words(triple.fused), words(new.fused), strict=True):
            assert (word.lower() in sources) or (old.lower() not in old_sources)
        changed += new.fused != triple.fused
    assert changed > len(triples) / 2, "most triples are rewritten"


def test_a_swapped_phrase_stands_in_source_and_target(triples, banks):
    swapped = 0
    for i, triple in enumerate(triples[:50]):
        raw, fused = _swap_phrase(triple.raw, triple.fused, banks, random.Random(i))
        if (raw, fused) == (triple.raw, triple.fused):
            continue
        swapped += 1
        assert fused[0] == fused[0].upper()
        both = [phrase for phrase in banks.phrases if phrase in raw and phrase.lower() in fused.lower()]
        assert both, (raw, fused)
    assert swapped > 25


def test_a_copy_task_holds_nothing_but_source_words(banks):
    rng = random.Random(3)
    for _ in range(50):
        task = copy_task(banks, rng)
        assert sorted(words(task.fused)) == sorted(words(f"{task.raw} {task.synthetic}"))


def test_noise_leaves_the_target_alone(triples):
    for i, triple in enumerate(triples[:40]):
        assert add_noise(triple, random.Random(i)).fused == triple.fused


def test_drawing_is_a_function_of_the_generator(triples, banks):
    def once():
        return draw(triples, range(60), banks, AugmentConfig(), 0.2, random.Random("x"))

    assert once() == once()


@pytest.mark.parametrize(
    "fused",
    [
        "Sentence 1 provides detailed real-world knowledge of the car.",
        "A car that was cut off in the middle of the",
        "Short one.",
    ],
)
def test_faulty_teacher_captions_are_not_learnt(fused):
    assert not is_sound(Triple("raw", "synthetic", fused))
    assert is_sound(Triple("raw", "synthetic", "A car stands in front of the museum."))
