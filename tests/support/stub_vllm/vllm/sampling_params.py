"""vLLM's, as far as we use them."""

from dataclasses import dataclass
from enum import Enum


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    temperature: float = 1.0
    max_tokens: int | None = 16
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    top_p: float = 1.0
    repetition: bool = False  # the stand-in's own: end a caption as vLLM's repetition_detection does

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        assert self.output_kind is RequestOutputKind.FINAL_ONLY, "our engine takes only whole captions"
