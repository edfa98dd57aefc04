"""What all rooms talk about, as frozen dataclasses and enums: outcomes, reasons, prompts, generations, units. No I/O, no Ray, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """What became of a row that was read."""

    FUSED = "fused"
    KEPT = "kept"  # one of the two captions was taken as it is, because a gate's setting says so
    REJECTED = "rejected"


class Reason(StrEnum):
    """Why a row was rejected, kept or flagged. A test compares the table in the docs with this list."""

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
    REPEATED_CAPTION = "repeated_caption"  # too many different pairs got this same caption


class FilterReason(StrEnum):
    """Which filter left a row out. Such rows are counted and not stored."""

    PUNSAFE = "punsafe"
    PWATERMARK = "pwatermark"
    SIMILARITY = "similarity"
    FEW_WORDS = "few_words"
    FEW_CHARACTERS = "few_characters"


class FinishReason(StrEnum):
    """Why an engine stopped writing."""

    EOS = "eos"
    LENGTH = "length"  # max_new_tokens were written without an end-of-sequence token
    ERROR = "error"  # this row failed; Generation.error says why
    CRASH = "crash"  # this row ended the engine's process twice while no other row was in it


@dataclass(frozen=True, slots=True)
class CaptionPair:
    """A raw and a synthetic caption of one image."""

    row_id: str
    raw: str
    synthetic: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an engine gets for one caption pair.

    `prefix_ids` + `suffix_ids` are the token ids of `text`, BOS included. The prefix is the constant instruction: the same
    tuple object in every prompt of a run. Both are empty for engines that take text (echo, api). `raw` and `synthetic` are
    the captions as they are in the prompt, after truncation.
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
    """What an engine wrote for the prompt with the same id.

    `text` has no special tokens and no white space around it. `score` is the best hypothesis' score under the configured
    scoring (log-probability over length), 0.0 where an engine has none. `error` is empty unless `finish` is ERROR.
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
        """The generation of a row that the engine could not fuse; `error`: the cause."""
        return cls(prompt.id, "", FinishReason.ERROR, prompt.tokens, error=f"{prompt.id}: {error}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one row, its reason, and the flags of a row that stays in the dataset."""

    outcome: Outcome
    reason: Reason | None = None
    detail: str = ""
    flags: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """A row range [start, stop) of one shard, which is fused, committed and retried as a whole."""

    id: str
    path: str
    start: int
    stop: int
    group: str  # the group of input shards whose units are compacted together, e.g. g00017

    @property
    def rows(self) -> int:
        return self.stop - self.start
