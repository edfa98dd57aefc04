"""Alignment: which source each word of a fused caption comes from, in all writings and scripts."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capsfusion_ray.core.word_alignment import Origin, align
from capsfusion_ray.core.word_keys import canonical_number, key_of

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=120)  # lone surrogates, controls, RTL, emoji


def origins(fused, raw, synthetic):
    return {fused[s.start : s.end]: s.origin for s in align(fused, raw, synthetic)}


def test_the_words_of_the_papers_figure_have_its_origins():
    got = origins("The Porsche 911 is a red car, fast.", "Porsche 911", "A red car.")
    assert got["Porsche"] == got["911"] == Origin.RAW
    assert got["red"] == got["car"] == got["a"] == Origin.SYNTHETIC
    assert got["fast"] == got["The"] == Origin.NEITHER
    assert origins("cats", "a cat", "CATS!")["cats"] == Origin.BOTH


@pytest.mark.parametrize(
    ("fused", "source"),
    [
        ("1,000", "1000"),
        ("1000", "1.000"),
        ("2.50", "2,5"),
        ("64 GB", "64GB"),
        ("64GB", "64 GB"),
        ("three", "3"),
        ("2nd", "second"),
        ("1960s", "1960's"),
        ("cities", "City"),
        ("city", "cities"),
        ("watches", "watch"),
        ("houses", "house"),
        ("movie", "movies"),
        ("women", "woman"),
        ("men’s", "Men's"),
        ("Müller", "Muller"),
        ("café", "cafe\u0301"),
        ("ＡＢＣ", "abc"),
        ("smart watch", "smartwatch"),
        ("smartwatch", "smart watch"),
        ("t-shirt", "tshirt"),
        ("wall paper", "wall-paper.jpg"),
        ("Giraffe Drinking", "giraffe_drinking-540x337"),
        ("BlackBerry", "black berry"),
        ("5", "5&amp;6"),
        ("हिन्दी", "हिन्दी में"),
        ("١٢٣", "123"),
    ],
)
def test_two_writings_of_one_word_are_the_same(fused, source):
    assert {s.origin for s in align(fused, source, "")} == {Origin.RAW}


@pytest.mark.parametrize(
    ("fused", "source"), [("911", "912"), ("care", "car"), ("cat", "landscape"), ("39", "men&#39;s")]
)
def test_different_words_stay_different(fused, source):
    assert {s.origin for s in align(fused, source, "")} == {Origin.NEITHER}


def test_languages_without_spaces_are_judged_by_neighbouring_characters():
    spans = align("赤い車と黒猫", "赤い車", "黒猫")
    assert [("赤い車と黒猫"[s.start : s.end], s.origin) for s in spans] == [
        ("赤い車", Origin.RAW),
        ("と", Origin.NEITHER),
        ("黒猫", Origin.SYNTHETIC),
    ]
    assert {s.origin for s in align("แมวดำ", "แมวดำ", "")} == {Origin.RAW}
    assert {s.origin for s in align("車赤", "赤い車", "")} == {Origin.NEITHER}, "the same characters in another order"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("1,234,567", "1234567"),
        ("1,234.50", "1234.5"),
        ("1.234,50", "1234.5"),
        ("007", "7"),
        ("0", "0"),
        ("2013.07.20", "2013.07.20"),
    ],
)
def test_number_forms(text, want):
    assert canonical_number(text) == want


@settings(max_examples=150, deadline=None)
@given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
def test_spans_tile_the_words_in_order_and_are_deterministic(fused, raw, synthetic):
    spans = align(fused, raw, synthetic)
    assert spans == align(fused, raw, synthetic)
    at = 0
    for start, end, _ in spans:
        assert at <= start < end
        assert not re.search(r"[A-Za-z0-9]", fused[at:start]), "a word between two spans"
        at = end
    assert not re.search(r"[A-Za-z0-9]", fused[at:])


@settings(max_examples=80, deadline=None)
@given(st.text("abcXYZ 0189.,-'", max_size=60))
def test_every_word_of_a_caption_comes_from_itself_as_source(text):
    assert {s.origin for s in align(text, text, text)} <= {Origin.BOTH}


@given(ANY_TEXT)
@settings(max_examples=100, deadline=None)
def test_a_key_is_a_string(word):
    assert isinstance(key_of(word), str)
