"""capsfusion_ray.training.metrics against values worked out by hand, and the bounds every metric must keep."""

import math

import pytest

from capsfusion_ray.training.metrics import (
    Example,
    cider,
    has_repeated_trigram,
    is_near_concatenation,
    measure,
    rouge_l,
    words_of,
)

pytest.importorskip("sacrebleu")

REFERENCES = [
    "A red Porsche 911 stands in front of the museum in Stuttgart.",
    "The poster for the 2014 jazz festival shows two trumpet players.",
    "Wooden chairs by Anna Berg are on sale at the Oslo design fair.",
]


def example(fused: str, raw: str = "x", synthetic: str = "y", reference: str = "z") -> Example:
    return Example(raw, synthetic, fused, reference)


def test_references_score_the_maximum_against_themselves():
    figures = measure([example(text, raw=text, synthetic=text, reference=text) for text in REFERENCES])
    assert figures["rouge_l"] == pytest.approx(1)
    assert figures["bleu_4"] == pytest.approx(1)
    assert figures["chrf"] == pytest.approx(1)
    assert figures["cider"] == pytest.approx(10)


def test_captions_without_a_common_word_score_zero():
    figures = measure([example("qq ww ee rr tt yy", reference=text) for text in REFERENCES])
    assert figures["rouge_l"] == 0
    assert figures["cider"] == 0


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    # common: "a dog runs" = 3 words; precision 3/4, recall 3/5
    assert rouge_l(["a", "black", "dog", "runs"], ["a", "small", "dog", "that", "runs"]) == pytest.approx(
        2 * 3 / (4 + 5)
    )


def test_cider_matches_a_value_computed_by_hand():
    # Two captions of one word: unigram cosine 1 for the first, 0 for the second; 2- to 4-grams are absent, so 0.
    # No difference of lengths, so no penalty: mean(10 * 1 / 4, 0) = 1.25.
    assert cider([["cat"], ["dog"]], [["cat"], ["bird"]]) == pytest.approx(1.25)


def test_cider_penalises_a_difference_of_lengths():
    long = ["cat"] + ["and"] * 6
    references = [["cat"], ["bird"]]
    weight = math.log(2)  # idf of "cat" and of the unseen "and" alike
    cosine = weight**2 / (math.sqrt(weight**2 + (6 * weight) ** 2) * weight)
    assert cider([long, ["dog"]], references) == pytest.approx(0.5 * 10 * cosine * math.exp(-36 / 72) / 4)


def test_kept_numbers_and_names_are_counted_over_all_captions():
    pair = {"raw": "Porsche 911 Safari, Stuttgart 2014", "synthetic": "a car"}
    figures = measure([example("A Porsche of 2014 in Stuttgart.", **pair)])
    assert figures["numbers_kept"] == pytest.approx(1 / 2)
    assert figures["capitalised_kept"] == pytest.approx(2 / 3)


def test_content_in_neither_source_ignores_endings_and_grammar():
    figures = measure([example("The chairs are standing on a terrace.", raw="chair stand", synthetic="a room")])
    assert figures["content_in_neither"] == pytest.approx(1 / 3)  # terrace of chairs, standing, terrace


def test_near_concatenation_sees_both_orders_but_not_a_fusion():
    raw, synthetic = "Porsche 911 Safari 2014", "A green car is shown on a road."
    assert is_near_concatenation(example(f"{raw}. {synthetic}", raw, synthetic))
    assert is_near_concatenation(example(f"{synthetic} {raw}.", raw, synthetic))
    assert not is_near_concatenation(example("A green 2014 Porsche 911 Safari is shown on a road.", raw, synthetic))


def test_filler_makes_a_near_concatenation_a_long_one_and_it_is_still_pasted():
    raw, synthetic = "Porsche 911 Safari 2014", "A green car is shown on a road."
    padded = example(f"The {raw} is a wonderful product that proudly features, namely, {synthetic}", raw, synthetic)
    figures = measure([padded])
    assert (figures["near_concatenation"], figures["pasted"]) == (0, 1)


def test_repeated_trigram():
    assert has_repeated_trigram(words_of("The red car and the red car."))
    assert not has_repeated_trigram(words_of("The red car and the blue car."))
