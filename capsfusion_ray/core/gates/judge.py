"""Judge a fused caption beside its sources with all gates. Pure: knows no engine, no Arrow, no files, no clock.

Each gate measures one fault: its size, which is 0 without the fault, and for the reader on which words. GatesConfig says what is
done: from `threshold` on the gate's action, from `flag_from` on a flag.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from capsfusion_ray.config import GateConfig, GatesConfig
from capsfusion_ray.core.gates.pairs import is_boilerplate, shared_content
from capsfusion_ray.core.gates.table import GATES, Gate
from capsfusion_ray.core.gates.triple import Triple, clip
from capsfusion_ray.core.types import CaptionPair, FinishReason, Generation, Outcome, Reason, Verdict


def judge(pair: CaptionPair, generation: Generation, gates: GatesConfig) -> Verdict:
    """The verdict on what an engine wrote for a pair."""
    failed = judge_failed(generation.finish, generation.error)
    return failed or judge_text(pair.raw, pair.synthetic, generation.text, generation.finish, gates)


def judge_failed(finish: FinishReason, error: str) -> Verdict | None:
    """The verdict on a row for which the engine wrote no caption; None if it wrote one."""
    if finish is FinishReason.CRASH:
        return Verdict(Outcome.REJECTED, Reason.ENGINE_CRASH, clip(error))
    if finish is FinishReason.ERROR:
        return Verdict(Outcome.REJECTED, Reason.ENGINE_ROW_ERROR, clip(error or "the engine gave no error"))
    return None


def judge_text(raw: str, synthetic: str, fused: str, finish: FinishReason | None, gates: GatesConfig) -> Verdict:
    """`judge` for captions without a pair; finish None: unknown."""
    return _judge(Triple(raw, synthetic, fused.strip(), finish), gates, _active(gates))


_Active = list[tuple[Reason, Gate, GateConfig]]


def _active(gates: GatesConfig) -> _Active:
    """The gates that are not ignored, each with its settings."""
    rules = [(name, gate, getattr(gates, name)) for name, gate in GATES]
    return [(name, gate, rule) for name, gate, rule in rules if rule.action != "ignore"]


_FAULTLESS = Verdict(Outcome.FUSED)  # one object for the nine rows in ten without a fault


def _judge(t: Triple, gates: GatesConfig, active: _Active) -> Verdict:
    reason: Reason | None = None
    detail = ""
    flags = _flags_of_pair(t, gates)
    for name, gate, rule in active:
        fault = gate(t)
        if fault is None:
            continue
        if fault.size >= rule.threshold:
            if rule.action == "reject" and reason is None:
                reason, detail = name, fault.detail
                if name is Reason.EMPTY_OUTPUT:
                    break  # the other gates measure words, and there are none
            else:
                flags.append(name)
        elif rule.flag_from is not None and fault.size >= rule.flag_from:
            flags.append(name)
    if reason is None:
        return Verdict(Outcome.FUSED, None, "", tuple(flags)) if flags else _FAULTLESS
    return Verdict(Outcome.REJECTED, reason, clip(detail), tuple(flags))


def _flags_of_pair(t: Triple, gates: GatesConfig) -> list[Reason]:
    """Flags for faults of the pair; the other policies for these were applied before the engine (pairs.py)."""
    flags: list[Reason] = []
    if gates.boilerplate == "flag" and is_boilerplate(t.raw.text):
        flags.append(Reason.BOILERPLATE)
    if gates.mismatched_pair == "flag" and not shared_content(t.raw, t.synthetic):
        flags.append(Reason.MISMATCHED_PAIR)
    return flags


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
