"""A caption pair, and what an engine made of it -> Verdict. Pure: knows no engine, no Arrow, no files, no clock.

Every gate is a function of one `Triple` that measures one fault: how bad (it grows with the fault, 0 where there is
none) and, for the reader, on what. What is done about it stands in GatesConfig: from `threshold` on the gate's action,
from `flag_from` on a flag. GATES is in the order in which the first rejecting gate names the reason; the others that
match are flags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from capsfusion_ray.config import GateConfig, GatesConfig
from capsfusion_ray.core.gates.entities import lost_entity, unsupported_name, unsupported_number
from capsfusion_ray.core.gates.language import wrong_script
from capsfusion_ray.core.gates.pairs import is_boilerplate, judge_pair, judge_sources, kept_text, shared_content
from capsfusion_ray.core.gates.triple import Fault, Triple, clip
from capsfusion_ray.core.gates.wording import (
    concatenation,
    copy_of_one,
    cut_off,
    empty_output,
    instruction_echo,
    repetition,
    too_long,
    too_short,
)
from capsfusion_ray.core.types import CaptionPair, FinishReason, Generation, Outcome, Reason, Verdict

__all__ = [
    "GATES",
    "Fault",
    "Triple",
    "is_boilerplate",
    "judge",
    "judge_failed",
    "judge_pair",
    "judge_sources",
    "judge_table",
    "judge_text",
    "kept_text",
    "shared_content",
]

GATES: tuple[tuple[Reason, Callable[[Triple], Fault | None]], ...] = (
    (Reason.EMPTY_OUTPUT, empty_output),
    (Reason.INSTRUCTION_ECHO, instruction_echo),
    (Reason.REPETITION, repetition),
    (Reason.WRONG_SCRIPT, wrong_script),
    (Reason.CONCATENATION, concatenation),
    (Reason.COPY_OF_ONE, copy_of_one),
    (Reason.UNSUPPORTED_NUMBER, unsupported_number),
    (Reason.UNSUPPORTED_NAME, unsupported_name),
    (Reason.CUT_OFF, cut_off),
    (Reason.LOST_ENTITY, lost_entity),
    (Reason.TOO_SHORT, too_short),
    (Reason.TOO_LONG, too_long),
)


def judge(pair: CaptionPair, generation: Generation, gates: GatesConfig) -> Verdict:
    """The verdict on what an engine wrote for a pair."""
    failed = judge_failed(generation.finish, generation.error)
    return failed or judge_text(pair.raw, pair.synthetic, generation.text, generation.finish, gates)


def judge_failed(finish: FinishReason, error: str) -> Verdict | None:
    """The verdict on a row that no engine could write; None: it wrote."""
    if finish is FinishReason.CRASH:
        return Verdict(Outcome.REJECTED, Reason.ENGINE_CRASH, clip(error))
    if finish is FinishReason.ERROR:
        return Verdict(Outcome.REJECTED, Reason.ENGINE_ROW_ERROR, clip(error or "the engine gave no error"))
    return None


def judge_text(raw: str, synthetic: str, fused: str, finish: FinishReason | None, gates: GatesConfig) -> Verdict:
    """`judge` for bare captions; finish None: unknown."""
    return _judge(Triple(raw, synthetic, fused.strip(), finish), gates, _active(gates))


_Active = list[tuple[Reason, Callable[[Triple], Fault | None], GateConfig]]


def _active(gates: GatesConfig) -> _Active:
    """The gates that do something, each with its rule."""
    rules = [(name, gate, getattr(gates, name)) for name, gate in GATES]
    return [(name, gate, rule) for name, gate, rule in rules if rule.action != "ignore"]


_FAULTLESS = Verdict(Outcome.FUSED)  # nine rows in ten


def _judge(t: Triple, gates: GatesConfig, active: _Active) -> Verdict:
    reason: Reason | None = None
    detail = ""
    flags: list[Reason] = []
    if gates.boilerplate == "flag" and is_boilerplate(t.raw.text):
        flags.append(Reason.BOILERPLATE)
    if gates.mismatched_pair == "flag" and not shared_content(t.raw, t.synthetic):
        flags.append(Reason.MISMATCHED_PAIR)
    for name, gate, rule in active:
        fault = gate(t)
        if fault is None:
            continue
        if fault.size >= rule.threshold:
            if rule.action == "reject" and reason is None:
                reason, detail = name, fault.detail
                if name is Reason.EMPTY_OUTPUT:
                    break  # nothing is left to measure
            else:
                flags.append(name)
        elif rule.flag_from is not None and fault.size >= rule.flag_from:
            flags.append(name)
    if reason is None:
        return Verdict(Outcome.FUSED, None, "", tuple(flags)) if flags else _FAULTLESS
    return Verdict(Outcome.REJECTED, reason, clip(detail), tuple(flags))


def judge_table(
    raw: Sequence[str],
    synthetic: Sequence[str],
    fused: Sequence[str],
    gates: GatesConfig,
    finish: Iterable[FinishReason | None] | None = None,
) -> list[Verdict]:
    """`judge_text` for columns of equal length; finish None: unknown for all rows."""
    finishes = [None] * len(fused) if finish is None else list(finish)
    rows = zip(raw, synthetic, fused, finishes, strict=True)
    active = _active(gates)
    return [_judge(Triple(r, s, f.strip(), end), gates, active) for r, s, f, end in rows]
