"""The pure steps of one unit: which rows need the engine, which pairs are the same, and that no row is lost."""

import pyarrow as pa
import pytest

from capsfusion_ray.config import GatesConfig
from capsfusion_ray.core.columns import (
    ERROR,
    FINISH,
    FUSED,
    INVALID,
    OUTCOME,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    RAW,
    REASON,
    ROW_ID,
    SYNTHETIC,
)
from capsfusion_ray.core.types import FinishReason, Generation, WorkUnit
from capsfusion_ray.core.unit_batch import Apart, UnitBatch
from capsfusion_ray.core.unit_steps import admit, judge_unit, waiting_pairs, with_generations
from capsfusion_ray.errors import AccountingError

TEXTS = [
    ("Cape Grim, 1905", "A white lighthouse on a coast."),
    (None, "A white lighthouse on a coast."),
    ("Cape Grim, 1905", "A white lighthouse on a coast."),
    ("IMG_1234.jpg", "A red lighthouse on a rock."),
    ("Cape Otway, 1848", "A lighthouse by the sea."),
]


def table_of(texts=TEXTS, invalid=None):
    return pa.table(
        {
            ROW_ID: [f"a.parquet:{i}" for i in range(len(texts))],
            "image_url": pa.nulls(len(texts), pa.string()),
            RAW: pa.array([raw for raw, _ in texts], pa.string()),
            SYNTHETIC: pa.array([synthetic for _, synthetic in texts], pa.string()),
            INVALID: pa.array(invalid or [None] * len(texts), pa.string()),
        }
    )


def unit(rows=5):
    return WorkUnit("id", "a.parquet", 0, rows, "g00000")


def test_only_rows_without_an_outcome_wait_for_the_engine_and_equal_pairs_are_written_once():
    table = admit(table_of(), GatesConfig())
    assert table[OUTCOME].to_pylist() == [None, "rejected", None, "kept", None]
    assert table[REASON].to_pylist() == [None, "null_caption", None, "boilerplate", None]
    assert table[FUSED].to_pylist()[3] == "A red lighthouse on a rock.", "a kept row has its text already"
    pairs, places = waiting_pairs(table)
    assert [pair.row_id for pair in pairs] == ["a.parquet:0", "a.parquet:4"]
    assert places == {TEXTS[0]: [0, 2], TEXTS[4]: [4]}


def test_rows_that_cannot_be_read_are_rejected_with_what_is_wrong():
    table = admit(table_of(TEXTS[:3], [RAW, None, "JSON"]), GatesConfig())
    assert table[REASON].to_pylist() == ["invalid_utf8", "null_caption", "unparsable"]


def fused(table):
    written = [
        Generation("p0", "Cape Grim's white lighthouse stands on a coast, 1905.", FinishReason.EOS, 30, 12),
        Generation("p4", "", FinishReason.ERROR, error="no memory"),
    ]
    return with_generations(table, {0: written[0], 2: written[0], 4: written[1]})


def test_the_tokens_of_a_shared_generation_count_once():
    table = fused(admit(table_of(), GatesConfig()))
    assert table[PROMPT_TOKENS].to_pylist() == [30, 0, 0, 0, 0]
    assert table[OUTPUT_TOKENS].to_pylist() == [12, 0, 0, 0, 0]
    assert table[FINISH].to_pylist() == ["eos", None, "eos", None, "error"]
    assert table[ERROR].to_pylist()[4] == "no memory"


def test_every_row_of_a_unit_has_an_outcome_in_its_part_and_in_its_summary():
    batch = UnitBatch(unit(7), fused(admit(table_of(), GatesConfig())), Apart({"punsafe": 2}))
    part, summary = judge_unit(batch, (), GatesConfig())
    assert part[OUTCOME].to_pylist() == ["fused", "rejected", "fused", "kept", "rejected"]
    assert (summary.fused, summary.kept, summary.rejected, summary.filtered) == (2, 1, 2, {"punsafe": 2})
    assert part["flags"].to_pylist()[3] == ["kept", "boilerplate"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda table: table.slice(1), "5 rows planned, 4 arrived"),
        (lambda table: table.take([1, 0, 2, 3, 4]), "row a.parquet:0 is out of order"),
    ],
)
def test_a_row_that_is_lost_or_out_of_order_is_refused(damage, said):
    batch = UnitBatch(unit(), damage(fused(admit(table_of(), GatesConfig()))))
    with pytest.raises(AccountingError, match=said):
        judge_unit(batch, (), GatesConfig())


def test_a_row_that_the_engine_left_out_is_refused():
    batch = UnitBatch(unit(), with_generations(admit(table_of(), GatesConfig()), {}))
    with pytest.raises(AccountingError, match=r"a\.parquet:0: the engine neither wrote a caption nor said why not"):
        judge_unit(batch, (), GatesConfig())
