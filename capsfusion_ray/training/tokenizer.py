"""Train a small byte-level BPE in which a word is the same pieces wherever it stands and however it is cased.

A model that sees 8,000 triples must learn to copy, and copying is easiest where source and target share their tokens.
Plain byte-level BPE gives "porsche", " Porsche", "(Porsche" and "PORSCHE" four unrelated spellings. Here the text is
rewritten before BPE, and rewritten back by the decoder, both with stock components of `tokenizers`, so that the saved
`tokenizer.json` needs no code of ours:

    JOIN    stands where a word begins without a space before it, so that every word can begin with one
    TITLE   before a word with one leading capital, which is then written small
    UPPER   before a word of two capitals or more, which is then written small

Single digits are kept apart. Runs of white space become one space: the one thing that does not survive the round trip.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# Control characters: captions do not contain them, and the normalizer drops them if one does.
JOIN, TITLE, UPPER = "\x01", "\x02", "\x03"

RAW_MARK, SYNTHETIC_MARK, FUSED_MARK, END, PAD = "<|raw|>", "<|synthetic|>", "<|fused|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (PAD, END, RAW_MARK, SYNTHETIC_MARK, FUSED_MARK)
# The shortest prompt that a model trained from scratch needs: its marks are single tokens, which no caption merges with.
SHORT_TEMPLATE = f"{RAW_MARK}{{raw}}{SYNTHETIC_MARK}{{synthetic}}{FUSED_MARK}"

_PUNCTUATION = '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~“”‘–—•·…®™©'
# A word with its leading space; an ending as in "men's"; one digit; punctuation with the JOIN after it; spaces.
_PIECES = rf"{TITLE}|{UPPER}|['’]\p{{L}}+| ?[\p{{L}}\p{{M}}]+| ?\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}{TITLE}{UPPER}]+|\s+"
# Inside a word marked UPPER: the look-behind must be spelled out for every distance from the mark. Letters beyond stay
# capitals in both directions.
_IN_UPPER_WORD = "(?<=" + "|".join(f"{UPPER} [A-Za-z]{{{n}}}" for n in range(24)) + ")"


def _word_starts() -> list[normalizers.Normalizer]:
    """JOIN where a word or number begins without a space.

    A rule a character, each consuming that character: a rule that inserts at an empty match would be shorter, but
    leaves tokenizers 0.23 with broken alignments and a panic.
    """
    after = dict.fromkeys(_PUNCTUATION, r"(?=[\p{L}0-9])")
    after |= dict.fromkeys(string.digits, r"(?=\p{L})")
    after |= dict.fromkeys(string.ascii_lowercase, "(?=[A-Z0-9])")  # iPhone, mp3
    rules = [(re.escape(character) + ahead) for character, ahead in after.items()]
    rules += [rf"{letter}(?=[0-9])|(?<=[A-Z]){letter}(?=[a-z])" for letter in string.ascii_uppercase]  # F18, TVs
    characters = [*after, *string.ascii_uppercase]
    starts = [normalizers.Replace(Regex(rule), f"{c}{JOIN} ") for rule, c in zip(rules, characters, strict=True)]
    # An apostrophe: O'Neill, or one that opens a quotation; the endings of "men's" and "don't" stay whole.
    ending = r"(?<=\p{L}['’])(?!(?:s|t|d|m|ll|re|ve)(?!\p{L}))(?=\p{L})|(?<!\p{L}['’])(?=[\p{L}0-9])"
    return [*starts, *(normalizers.Replace(Regex(rf"{c}(?:{ending})"), f"{c}{JOIN} ") for c in "'’")]


def _normalizer() -> normalizers.Normalizer:
    capitals = string.ascii_uppercase
    return normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(f"[{JOIN}{TITLE}{UPPER}]"), ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Prepend(" "),  # as every word has one; the engines strip the decoded text
            *_word_starts(),
            *(normalizers.Replace(Regex(f" {c}(?=[A-Z])"), f"{UPPER} {c.lower()}") for c in capitals),
            *(normalizers.Replace(f" {c}", f"{TITLE} {c.lower()}") for c in capitals),
            # A capital that no rule above reached (after 「, or in ÉCOLE) stays as it is.
            *(normalizers.Replace(Regex(_IN_UPPER_WORD + c), c.lower()) for c in capitals),
        ]
    )


def _decoder() -> decoders.Decoder:
    small = string.ascii_lowercase
    return decoders.Sequence(
        [
            decoders.ByteLevel(),
            *(decoders.Replace(f"{TITLE} {letter}", f" {letter.upper()}") for letter in small),
            *(decoders.Replace(Regex(_IN_UPPER_WORD + letter), letter.upper()) for letter in small),
            decoders.Replace(Regex(f"[{TITLE}{UPPER}]"), ""),
            decoders.Replace(Regex(rf"{JOIN} ?"), ""),
        ]
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer for prompts in SHORT_TEMPLATE, its merges learned from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = _decoder()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=RAW_MARK,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[RAW_MARK, SYNTHETIC_MARK, FUSED_MARK],
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
