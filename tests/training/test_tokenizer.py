"""The tokenizer of models trained from scratch: lossless but for spaces, and blind to where a word stands."""

import pytest
from transformers import AutoTokenizer

from capsfusion_ray.training.tokenizer import SHORT_TEMPLATE, SPECIAL_TOKENS, train_tokenizer

TEXTS = [
    "VW T-ROC alloy wheel production vehicle teaser",
    '"Change Over Time" by Sonic Liberation Front, 1881 (from here)',
    "Todd-Snyder-Fall-2017-mens-fashion-show-backstage-the-impression-109",
    "Commentary On Aristotle's 'On Sense' And 'On Memory'",
    "D'Addario EXL160SL Nickel Wound .050-105 « Electric Bass Strings",
    "iPhone 6s, TVs, DVDs & McDonald's: 50% off!",
    "Religion「Pope Francis」:写真・画像(9)[壁紙.com] 🙂 Ünïcödé ÉCOLE",
    "Men's Levi's 501® don't l'Amérique O'Neill book'Grace",
    "a",
    "&quot;quoted&quot; <b>bold</b> \\ ^ ~",
]


@pytest.fixture(scope="module")
def tokenizer(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([text for row in rows for text in row.values()] + TEXTS, 600).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)  # as everybody else will load it


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text)).strip() == text


@pytest.mark.parametrize(
    "text", ["Porsche", "x Porsche", "(Porsche", '"Porsche', "x-Porsche", "9Porsche", "PORSCHE", "porsche"]
)
def test_a_word_is_the_same_pieces_wherever_it_stands_and_however_it_is_cased(tokenizer, text):
    alone = encode(tokenizer, "porsche")
    assert encode(tokenizer, text)[-len(alone) :] == alone


def test_digits_are_single_tokens(tokenizer):
    assert len(encode(tokenizer, "20174")) == 5


def test_captions_do_not_merge_with_the_marks_of_the_prompt(tokenizer):
    raw, synthetic = "Porsche 911", "'s car."
    marks = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    whole = tokenizer(SHORT_TEMPLATE.format(raw=raw, synthetic=synthetic))["input_ids"]
    assert [i for i in whole if i in marks] == marks[2:]
    assert whole == [marks[2], *encode(tokenizer, raw), marks[3], *encode(tokenizer, synthetic), marks[4]]


def test_control_characters_in_a_caption_cannot_recase_it(tokenizer):
    assert tokenizer.decode(encode(tokenizer, "a \x02 car\x03 here\x01 now")).strip() == "a car here now"
