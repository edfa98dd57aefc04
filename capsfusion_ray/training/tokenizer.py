"""Train a small byte-level BPE in which a word has the same tokens at each place and in each case.

A model that sees 8,000 triples must learn to copy, which is easiest if source and target have the same tokens. Plain
byte-level BPE encodes "porsche", " Porsche", "(Porsche" and "PORSCHE" in four unrelated ways. Here the text is rewritten
before BPE, and the decoder reverses that. Both use only standard components of `tokenizers`, so the saved
`tokenizer.json` needs no code of this project. Three marks are inserted:

    JOIN    where a word begins without a space before it; a space is inserted after the mark
    TITLE   before a word with one leading capital, which becomes a small letter
    UPPER   before a word of two capitals or more, which become small letters

Each digit is a token of its own. Runs of white space become one space; decoding does not restore them.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# The marks are control characters. Captions do not contain them; if one does, the normalizer drops them.
JOIN, TITLE, UPPER = "\x01", "\x02", "\x03"

RAW_MARK, SYNTHETIC_MARK, FUSED_MARK, END, PAD = "<|raw|>", "<|synthetic|>", "<|fused|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (PAD, END, RAW_MARK, SYNTHETIC_MARK, FUSED_MARK)
# The shortest prompt for a model trained from scratch. Its marks are single tokens, with which no caption merges.
SHORT_TEMPLATE = f"{RAW_MARK}{{raw}}{SYNTHETIC_MARK}{{synthetic}}{FUSED_MARK}"

_PUNCTUATION = '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~“”‘–—•·…®™©'
# Marks; an ending as in "men's"; a word with its leading space; one digit; punctuation with the JOIN after it; spaces.
_PIECES = rf"{TITLE}|{UPPER}|['’]\p{{L}}+| ?[\p{{L}}\p{{M}}]+| ?\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}{TITLE}{UPPER}]+|\s+"
# A place inside a word marked UPPER. The look-behind must be written out for each distance from the mark. Letters further
# away stay capitals, in encoding and in decoding.
_IN_UPPER_WORD = "(?<=" + "|".join(f"{UPPER} [A-Za-z]{{{n}}}" for n in range(24)) + ")"


def _word_starts() -> list[normalizers.Normalizer]:
    """Rules that insert JOIN where a word or number begins without a space.

    There is one rule per character, and each consumes that character. A rule that inserts at an empty match would be
    shorter, but in tokenizers 0.23 it breaks the alignments and causes a panic.
    """
    after = dict.fromkeys(_PUNCTUATION, r"(?=[\p{L}0-9])")
    after |= dict.fromkeys(string.digits, r"(?=\p{L})")
    after |= dict.fromkeys(string.ascii_lowercase, "(?=[A-Z0-9])")  # iPhone, mp3
    rules = [(re.escape(character) + ahead) for character, ahead in after.items()]
    rules += [rf"{letter}(?=[0-9])|(?<=[A-Z]){letter}(?=[a-z])" for letter in string.ascii_uppercase]  # F18, TVs
    characters = [*after, *string.ascii_uppercase]
    starts = [normalizers.Replace(Regex(rule), f"{c}{JOIN} ") for rule, c in zip(rules, characters, strict=True)]
    # After an apostrophe, as in O'Neill or at the start of a quotation. The endings of "men's" and "don't" stay whole.
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
            normalizers.Prepend(" "),  # so that the first word has a space, too; the engines strip the decoded text
            *_word_starts(),
            *(normalizers.Replace(Regex(f" {c}(?=[A-Z])"), f"{UPPER} {c.lower()}") for c in capitals),
            *(normalizers.Replace(f" {c}", f"{TITLE} {c.lower()}") for c in capitals),
            # A capital that no rule above reaches (after 「, or in ÉCOLE) stays as it is.
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
    """Train a tokenizer for prompts in SHORT_TEMPLATE on `texts`."""
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
