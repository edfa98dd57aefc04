"""The nouns as frozen dataclasses and enums. No I/O, no Ray, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """Where a planned row ended."""

    FUSED = "fused"
    KEPT = "kept"  # one source was kept as it is, by policy
    REJECTED = "rejected"


class Reason(StrEnum):
    """Why a row was rejected, kept or flagged. The README's table is checked against this list."""

    # before the engine
    NULL_CAPTION = "null_caption"
    EMPTY_CAPTION = "empty_caption"
    INVALID_UTF8 = "invalid_utf8"
    UNPARSABLE = "unparsable"  # the line of a text file breaks its format
    BOILERPLATE = "boilerplate"
    MISMATCHED_PAIR = "mismatched_pair"
    # the engine
    PROMPT_TOO_LONG = "prompt_too_long"
    ENGINE_ROW_ERROR = "engine_row_error"
    ENGINE_CRASH = "engine_crash"
    # after the engine
    EMPTY_OUTPUT = "empty_output"
    INSTRUCTION_ECHO = "instruction_echo"
    CUT_OFF = "cut_off"
    REPETITION = "repetition"
    CONCATENATION = "concatenation"
    COPY_OF_ONE = "copy_of_one"
    UNSUPPORTED_NUMBER = "unsupported_number"
    UNSUPPORTED_NAME = "unsupported_name"
    LOST_ENTITY = "lost_entity"
    WRONG_SCRIPT = "wrong_script"
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    # after the run
    REPEATED_CAPTION = "repeated_caption"  # too many different pairs got this very caption


class FilterReason(StrEnum):
    """Why a row was left out on a column's value: counted, not stored."""

    PUNSAFE = "punsafe"
    PWATERMARK = "pwatermark"
    SIMILARITY = "similarity"
    FEW_WORDS = "few_words"
    FEW_CHARACTERS = "few_characters"


class FinishReason(StrEnum):
    """Why an engine stopped writing."""

    EOS = "eos"
    LENGTH = "length"  # max_new_tokens reached without EOS
    ERROR = "error"  # this row failed; Generation.error says why
    CRASH = "crash"  # this row killed the process it was fused in, alone and twice


@dataclass(frozen=True, slots=True)
class CaptionPair:
    """A raw and a synthetic caption of one image."""

    row_id: str
    raw: str
    synthetic: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an engine gets for one caption pair.

    `prefix_ids` (the constant instruction, the same tuple object for every prompt of a run) + `suffix_ids` are the
    token ids of `text` as the model's tokenizer gives them, BOS included. Engines that take text (echo, api) find both
    tuples empty. `raw` and `synthetic` are the captions as they stand in the prompt, after truncation.
    """

    id: str
    text: str
    raw: str
    synthetic: str
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return len(self.prefix_ids) + len(self.suffix_ids)


@dataclass(frozen=True, slots=True)
class Generation:
    """What an engine wrote for the prompt of the same id.

    `text` is stripped, special tokens skipped. `score` is the winning hypothesis' score under the configured scoring
    (log-probability over length), 0.0 where an engine has none. `error` is empty unless finish is ERROR.
    """

    id: str
    text: str
    finish: FinishReason
    prompt_tokens: int = 0
    output_tokens: int = 0
    score: float = 0.0
    error: str = ""

    @classmethod
    def failed(cls, prompt: Prompt, error: str) -> Generation:
        """For a row that the engine could not write; `error` says why."""
        return cls(prompt.id, "", FinishReason.ERROR, prompt.tokens, error=f"{prompt.id}: {error}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one row, and why."""

    outcome: Outcome
    reason: Reason | None = None
    detail: str = ""
    flags: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """A row range [start, stop) of one shard; the unit of retry, commit and resume."""

    id: str
    path: str
    start: int
    stop: int
    group: str  # the group of input shards that it is compacted with, e.g. g00017

    @property
    def rows(self) -> int:
        return self.stop - self.start
