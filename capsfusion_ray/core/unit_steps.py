"""The steps of one unit between the shard and the part: admit its rows, let an engine write, judge what it wrote.

The table of a unit goes in, a table comes out. Knows no Ray, no engine and no store.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from capsfusion_ray.config import GatesConfig
from capsfusion_ray.core.accounting import UnitSummary, summarise
from capsfusion_ray.core.columns import (
    DETAIL,
    ERROR,
    FINISH,
    FLAGS,
    FUSED,
    INVALID,
    OUTCOME,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    RAW,
    REASON,
    ROW_ID,
    SYNTHETIC,
    part_schema,
)
from capsfusion_ray.core.gates import judge_failed, judge_sources, judge_table, kept_text
from capsfusion_ray.core.types import CaptionPair, FinishReason, Generation, Outcome, Reason, Verdict
from capsfusion_ray.core.unit_batch import UnitBatch
from capsfusion_ray.errors import AccountingError

KEPT = "kept"  # first flag of a kept row; the reason follows it


def admit(table: pa.Table, gates: GatesConfig) -> pa.Table:
    """Decide which rows need the engine: their outcome is null in the table that is returned.

    Adds the columns outcome, reason, detail and capsfusion (the text of a kept row); drops the reader's column INVALID.
    """
    verdicts: list[Verdict | None] = []
    fused: list[str | None] = []
    for raw, synthetic, invalid in zip(*(table[name].to_pylist() for name in (RAW, SYNTHETIC, INVALID)), strict=True):
        text = None
        if invalid is not None:
            verdict: Verdict | None = _invalid(invalid)
        else:
            verdict = judge_sources(raw, synthetic, gates)
            if verdict is not None and verdict.outcome is Outcome.KEPT and verdict.reason is not None:
                text = kept_text(raw, synthetic, verdict.reason, gates)
        verdicts.append(verdict)
        fused.append(text)
    added: dict[str, list[str | None]] = {
        OUTCOME: [str(v.outcome) if v else None for v in verdicts],
        REASON: [str(v.reason) if v and v.reason else None for v in verdicts],
        DETAIL: [v.detail if v else "" for v in verdicts],
        FUSED: fused,
    }
    table = table.drop_columns([INVALID])
    for name, values in added.items():
        table = table.append_column(name, pa.array(values, pa.string()))
    return table


def _invalid(what: str) -> Verdict:
    if what in (RAW, SYNTHETIC):
        return Verdict(Outcome.REJECTED, Reason.INVALID_UTF8, f"column {what} is not UTF-8; shown repaired")
    return Verdict(Outcome.REJECTED, Reason.UNPARSABLE, f"the line is not valid {what}")


def waiting_pairs(table: pa.Table) -> tuple[list[CaptionPair], dict[tuple[str, str], list[int]]]:
    """The distinct pairs that the engine must fuse, and for each pair (raw, synthetic) the numbers of the rows that have it."""
    places: dict[tuple[str, str], list[int]] = {}
    pairs = []
    columns = (table[OUTCOME], table[ROW_ID], table[RAW], table[SYNTHETIC])
    for i, (outcome, row_id, raw, synthetic) in enumerate(zip(*(c.to_pylist() for c in columns), strict=True)):
        if outcome is not None:
            continue
        if (served := places.get((raw, synthetic))) is None:
            places[raw, synthetic] = [i]
            pairs.append(CaptionPair(row_id, raw, synthetic))
        else:
            served.append(i)
    return pairs, places


def with_generations(table: pa.Table, generations: dict[int, Generation]) -> pa.Table:
    """Set the engine's columns; `generations`: by row number. The tokens of a generation that rows share count once."""
    fused = table[FUSED].to_pylist()
    finish: list[str | None] = [None] * len(fused)
    error: list[str | None] = [None] * len(fused)
    tokens: dict[str, list[int]] = {PROMPT_TOKENS: [0] * len(fused), OUTPUT_TOKENS: [0] * len(fused)}
    counted: set[str] = set()
    for i, generation in sorted(generations.items()):
        fused[i], finish[i], error[i] = generation.text, str(generation.finish), generation.error
        if generation.id not in counted:
            counted.add(generation.id)
            tokens[PROMPT_TOKENS][i] = generation.prompt_tokens
            tokens[OUTPUT_TOKENS][i] = generation.output_tokens
    table = table.drop_columns([FUSED]).append_column(FUSED, pa.array(fused, pa.string()))
    for name, values in tokens.items():
        table = table.append_column(name, pa.array(values, pa.int32()))
    return table.append_column(FINISH, pa.array(finish, pa.string())).append_column(ERROR, pa.array(error, pa.string()))


def judge_unit(batch: UnitBatch, fields: Sequence[tuple[str, str]], gates: GatesConfig) -> tuple[pa.Table, UnitSummary]:
    """Judge every fused row against both sources; returns the unit's part and its summary.

    `fields`: name and type of each column that is carried along. Raises AccountingError unless the batch accounts for
    exactly the rows of the unit, in order, and the engine has answered for every row that waited.
    """
    table = batch.table
    _check_rows(batch)
    outcomes = table[OUTCOME].to_pylist()
    reasons = table[REASON].to_pylist()
    details = table[DETAIL].to_pylist()
    flags: list[list[str]] = [[] for _ in outcomes]
    for i, outcome in enumerate(outcomes):
        if outcome == Outcome.KEPT:
            flags[i] = [KEPT, reasons[i]]
    for i, verdict in _verdicts(table, gates):
        outcomes[i] = str(verdict.outcome)
        reasons[i] = str(verdict.reason) if verdict.reason else None
        details[i] = verdict.detail
        flags[i] = [str(flag) for flag in verdict.flags]
    for name, values in ((OUTCOME, outcomes), (REASON, reasons), (DETAIL, details)):
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.string()))
    table = table.append_column(FLAGS, pa.array(flags, pa.list_(pa.string())))
    schema = part_schema(fields)
    part = table.select(schema.names).cast(schema)
    return part, summarise(batch, part)


_FINISH_REASONS = {str(finish): finish for finish in FinishReason}


def _verdicts(table: pa.Table, gates: GatesConfig) -> Iterator[tuple[int, Verdict]]:
    """(row number, verdict) of every row that the engine was asked to fuse."""
    waiting = [i for i, outcome in enumerate(table[OUTCOME].to_pylist()) if outcome is None]
    asked = table.take(pa.array(waiting, pa.int64()))  # with a type: an empty list would become an array of nulls
    finishes = [_FINISH_REASONS.get(finish) for finish in asked[FINISH].to_pylist()]
    if None in finishes:
        row_id = asked[ROW_ID][finishes.index(None)]
        raise AccountingError(f"{row_id}: the engine neither wrote a caption nor said why not")
    texts = [text or "" for text in asked[FUSED].to_pylist()]
    written = judge_table(asked[RAW].to_pylist(), asked[SYNTHETIC].to_pylist(), texts, gates, finishes)
    for i, finish, error, verdict in zip(waiting, finishes, asked[ERROR].to_pylist(), written, strict=True):
        assert finish
        yield i, judge_failed(finish, error or "") or verdict


def _check_rows(batch: UnitBatch) -> None:
    unit = batch.unit
    if batch.table.num_rows + batch.apart.rows != unit.rows:
        raise AccountingError(
            f"unit {unit.id} ({unit.path}): {unit.rows} rows planned, {batch.table.num_rows} arrived and {batch.apart.rows} were "
            "filtered or unreadable"
        )
    last = unit.start - 1
    for row_id in batch.table[ROW_ID].to_pylist():
        number = int(row_id.removeprefix(unit.path + ":"))
        if not last < number < unit.stop:
            raise AccountingError(
                f"unit {unit.id}: row {row_id} is out of order or not of {unit.path}:{unit.start}-{unit.stop}"
            )
        last = number
