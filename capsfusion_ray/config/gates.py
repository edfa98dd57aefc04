"""Settings of the gates: what happens to a pair or a fused caption with a fault."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from capsfusion_ray.config.check import check
from capsfusion_ray.config.setting import section, setting

PairPolicy = Literal["fuse", "flag", "keep_raw", "keep_synthetic", "reject"]
MissingPolicy = Literal["keep_raw", "keep_synthetic", "reject"]
Action = Literal["reject", "flag", "ignore"]  # "ignore" and not "off": YAML reads a bare off as false


@dataclass(frozen=True)
class GateConfig:
    """One gate. Every measure grows with the fault: from `threshold` on the gate acts, from `flag_from` on it flags."""

    action: Action = setting("flag", "what the gate does from `threshold` on")
    threshold: float = setting(1.0, "")
    flag_from: float | None = setting(None, "flag from this value on; null: never")

    def check(self, key: str) -> None:
        """Raises ConfigError for thresholds that cannot work; `key` names the gate."""
        check(self.threshold > 0, f"{key}.threshold", self.threshold, "above 0")
        ok = self.flag_from is None or 0 < self.flag_from < self.threshold
        check(ok, f"{key}.flag_from", self.flag_from, f"null, or above 0 and below {key}.threshold={self.threshold:g}")


def _gate(action: Action, threshold: float, measure: str, flag_from: float | None = None) -> GateConfig:
    return section(lambda: GateConfig(action, threshold, flag_from), measure)


@dataclass(frozen=True)
class GatesConfig:
    """What is done about each fault. A key has the name of its reason; docs/gates.md has the measured rates.

    The first four act before the engine, on the pair: a policy that would keep a missing caption rejects the row. The others
    act on the fused caption, in this order, and the first that rejects gives the reason. repeated_caption acts on the whole
    dataset. From `threshold` on a gate takes its action, from `flag_from` on (if set) it flags.
    """

    null_caption: MissingPolicy = setting("reject", "a caption is null")
    empty_caption: MissingPolicy = setting("reject", "a caption is empty")
    boilerplate: PairPolicy = setting(
        "keep_synthetic", "the raw caption is 'IMG_1234.jpg', 'thumbnail', a bare number or a hash"
    )
    mismatched_pair: PairPolicy = setting("fuse", "the captions share no content word: 35% of real pairs")
    empty_output: GateConfig = _gate("reject", 1.0, "1 if the engine wrote no word")
    instruction_echo: GateConfig = _gate("reject", 2, "2: talks about the task; 1: borrows a phrase of the prompt", 1)
    repetition: GateConfig = _gate(
        "reject", 0.3, "share of 4-grams that repeat earlier ones and that no source repeats", 0.1
    )
    wrong_script: GateConfig = _gate(
        "reject", 0.3, "share of letters in a script of neither source; 1 for another language"
    )
    concatenation: GateConfig = _gate("flag", 0.9, "share of words that are both sources pasted verbatim")
    copy_of_one: GateConfig = _gate("flag", 0.9, "share of words that are one source verbatim, with the other unused")
    unsupported_number: GateConfig = _gate("reject", 1, "numbers that neither source has")
    unsupported_name: GateConfig = _gate("flag", 1, "capitalised words that neither source has")
    cut_off: GateConfig = _gate("reject", 2, "2: begins inside a sentence; 1: stopped at max_new_tokens", 1)
    lost_entity: GateConfig = _gate("flag", 0.5, "share of the raw caption's names and numbers that are missing")
    too_short: GateConfig = _gate("reject", 10, "words of the longer source per fused word", 3)
    too_long: GateConfig = _gate("reject", 8, "fused words per word of both sources", 3)
    repeated_caption: GateConfig = _gate(
        "flag", 0.001, "share of the run's pairs that got this very caption, at least 20 pairs"
    )

    def __post_init__(self) -> None:
        for name, gate in vars(self).items():
            if isinstance(gate, GateConfig):
                gate.check(f"gates.{name}")
