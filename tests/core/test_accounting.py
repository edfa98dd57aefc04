"""The accounting: every planned row is counted once, whatever is added, subtracted, retried or removed."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from capsfusion_ray.core.accounting import (
    OUTCOMES,
    STORED,
    Counts,
    UnitSummary,
    check_belongs,
    check_stored,
    summarise,
)
from capsfusion_ray.core.columns import part_schema
from capsfusion_ray.core.types import FilterReason, Outcome, Reason, WorkUnit
from capsfusion_ray.core.unit_batch import Apart, UnitBatch
from capsfusion_ray.errors import AccountingError

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "output_of_0_1"
REASONS = [str(reason) for reason in Reason]
COUNTS = st.integers(0, 1000)

# One row of a part: its outcome, its reason, its flags, its tokens.
rows = st.one_of(
    st.tuples(st.just("fused"), st.none(), st.lists(st.sampled_from(REASONS), max_size=3, unique=True), COUNTS, COUNTS),
    st.sampled_from(REASONS).map(lambda reason: ("kept", reason, ["kept", reason], 0, 0)),
    st.tuples(st.just("rejected"), st.sampled_from(REASONS), st.just([]), COUNTS, COUNTS),
)
aparts = st.builds(
    lambda filtered, unreadable, not_retried: (filtered, unreadable, not_retried),
    st.dictionaries(st.sampled_from([str(reason) for reason in FilterReason]), st.integers(1, 5)),
    st.lists(st.integers(1, 5), max_size=2),
    st.integers(0, 3),
)


def part_of(written):
    names = ("outcome", "reason", "flags", "prompt_tokens", "output_tokens")
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in written], schema=part_schema(()))


def unit_of(rows, start=7):
    return WorkUnit("u", "a.parquet", start, start + rows, "g00000")


def summary_of(written, apart=({}, [], 0), **spent):
    """A unit of these rows and these rows apart, as an actor's commit counts them."""
    filtered, unreadable, not_retried = apart
    ranges, at = [], 1000
    for length in unreadable:
        ranges.append((at, at + length, "bad page"))
        at += length
    total = len(written) + sum(filtered.values()) + sum(unreadable) + not_retried
    batch = UnitBatch(unit_of(total), part_of(written), Apart(filtered, tuple(ranges), not_retried), spent)
    return summarise(batch, batch.table)


def stored_in(written, kind):
    """The rows of a part as they are in data/ or in rejected/, where only rejected/ has a reason."""
    table = part_of([row for row in written if row[0] in STORED[kind]])
    return table if kind == "rejected" else table.drop_columns(["reason"])


# ------------------------------------------------------------------------------------------------------- one unit


@given(st.lists(rows, max_size=20), aparts)
def test_a_summary_counts_each_row_once(written, apart):
    filtered, unreadable, not_retried = apart
    summary = summary_of(written, apart, engine_s=1.5, device="cpu")
    outcomes = Counter(row[0] for row in written)
    assert {name: summary.rows(name) for name in OUTCOMES} == {
        "fused": outcomes["fused"],
        "kept": outcomes["kept"],
        "rejected": outcomes["rejected"],
        "filtered": sum(filtered.values()),
        "removed": 0,
        "unreadable": sum(unreadable),
    }
    assert summary.planned == sum(summary.rows(name) for name in OUTCOMES) + not_retried
    assert summary.reasons == Counter(row[1] for row in written if row[0] == "rejected")
    assert summary.flags == Counter(flag for row in written if row[0] != "rejected" for flag in row[2])
    assert summary.prompt_tokens == sum(row[3] for row in written)
    assert summary.output_tokens == sum(row[4] for row in written)
    assert (summary.engine_s, summary.device) == (1.5, "cpu")
    assert len(summary.unreadable_errors) == len(unreadable)


@pytest.mark.parametrize("outcome", [None, "lost"])
def test_a_row_without_a_known_outcome_is_an_error(outcome):
    written = [("fused", None, [], 0, 0), (outcome, None, [], 0, 0)]
    with pytest.raises(AccountingError, match=r"unit u \(a.parquet:7-9\): 2 rows planned, 1 counted"):
        summary_of(written)


@given(st.lists(rows, min_size=1, max_size=20), aparts, st.sampled_from(["fused", "kept", "removed", "unreadable"]))
def test_one_row_too_many_or_too_few_is_an_error(written, apart, name):
    summary = summary_of(written, apart)
    for step in (1, -1):
        with pytest.raises(AccountingError, match=r"rows planned|negative counts"):
            replace(summary, **{name: getattr(summary, name) + step}).check()


def test_counts_that_cancel_out_are_an_error():
    with pytest.raises(AccountingError, match=r"negative counts of rows: \{'fused': -1\}"):
        UnitSummary("u", "a", 0, 1, fused=-1, removed=2).check()


def test_rejected_rows_need_as_many_reasons():
    with pytest.raises(AccountingError, match=r"2 rows rejected, for these reasons: \{'cut_off': 1\}"):
        UnitSummary("u", "a", 0, 2, rejected=2, reasons={"cut_off": 1}).check()


@given(st.lists(rows, max_size=20), aparts)
def test_a_summary_survives_its_file(written, apart):
    summary = summary_of(written, apart, busy_s=0.25)
    data = json.loads(json.dumps(summary.to_dict()))
    assert UnitSummary.parse(data) == summary
    assert data["settled"] == apart[2], "the name in files is that of version 0.1"
    counts = [field.name for field in fields(UnitSummary) if field.name not in ("id", "path", "start", "stop")]
    for name in counts:  # an earlier version did not count it
        short = {key: value for key, value in data.items() if key != {"not_retried": "settled"}.get(name, name)}
        assert UnitSummary.parse(short) == replace(summary, **{name: getattr(UnitSummary("", "", 0, 0), name)})


def test_a_summary_of_another_unit_is_refused():
    summary = summary_of([("fused", None, [], 1, 1)])
    check_belongs(summary, unit_of(1), "_units/u.parquet")
    for other in (
        unit_of(2),
        unit_of(1, start=8),
        WorkUnit("v", "a.parquet", 7, 8, "g"),
        WorkUnit("u", "b", 7, 8, "g"),
    ):
        with pytest.raises(AccountingError, match=r"_units/u\.parquet: holds rows of a\.parquet:7-8 \(unit u\)"):
            check_belongs(summary, other, "_units/u.parquet")


# ------------------------------------------------------------------------------------------- subtracting and adding


@given(st.lists(st.tuples(rows, st.booleans()), max_size=20), aparts, st.sampled_from(["data", "rejected"]))
def test_removed_rows_are_counted_as_removed_and_as_nothing_else(drawn, apart, kind):
    written = [row for row, _ in drawn]
    gone = [row for row, goes in drawn if goes and row[0] in STORED[kind]]
    left = [row for row, goes in drawn if not (goes and row[0] in STORED[kind])]
    before = summary_of(written, apart)
    after = before.without(stored_in(gone, kind), removed=True)
    after.check()
    want = summary_of(left, apart)
    assert after.removed == len(gone)
    for name in ("fused", "kept", "rejected", "reasons", "flags", "filtered", "unreadable"):
        assert getattr(after, name) == getattr(want, name)
    assert after.prompt_tokens == before.prompt_tokens, "the tokens were spent all the same"


@given(st.lists(rows, max_size=10), st.lists(rows, min_size=1, max_size=10), st.sampled_from(["data", "rejected"]))
def test_more_rows_than_were_counted_cannot_be_subtracted(written, more, kind):
    more = [row for row in more if row[0] in STORED[kind]]
    assume(more)
    summary = summary_of(written)
    with pytest.raises(AccountingError, match="more rows are subtracted than were counted"):
        summary.without(stored_in(written + more, kind), removed=False)


def test_subtracting_a_row_whose_outcome_was_not_counted_is_an_error_although_flags_and_reasons_agree():
    fused = part_of([("fused", None, [], 0, 0)]).drop_columns(["reason"])
    with pytest.raises(AccountingError, match=r"\{'fused': -1\}"):
        UnitSummary("u", "a", 0, 1, kept=1, flags={"kept": 1, "boilerplate": 1}).without(fused, removed=True)


@given(st.lists(rows, max_size=20), st.data())
def test_a_retry_ends_as_if_its_rows_had_been_written_so_at_first(written, data):
    """Rejected rows are fused again: the old rows go, the retry's part comes, and nothing else changes."""
    again = [i for i, row in enumerate(written) if row[0] == "rejected"]
    new = data.draw(st.lists(rows, min_size=len(again), max_size=len(again)))
    before = summary_of(written, engine_s=1.0)
    retried = summary_of(new, ({}, [], len(written) - len(again)), engine_s=2.0)
    after = before.without(stored_in([written[i] for i in again], "rejected"), removed=False).with_retried(retried)
    after.check()
    want = summary_of([row for i, row in enumerate(written) if i not in again] + new)
    for name in ("fused", "kept", "rejected", "reasons", "flags"):
        assert getattr(after, name) == getattr(want, name)
    assert after.engine_s == 3.0
    assert after.output_tokens == before.output_tokens + retried.output_tokens
    assert after.not_retried == 0


@given(st.lists(rows, max_size=20), st.integers(0, 5))
def test_a_flag_and_rejects_that_a_run_adds_at_its_end(written, n):
    summary = summary_of(written)
    assert summary.with_flag("repeated_caption", n).flags.get("repeated_caption", 0) == (
        summary.flags.get("repeated_caption", 0) + n
    )
    fused = [row for row in written if row[0] == "fused"][:n]
    moved = summary.without(stored_in(fused, "data"), removed=False).with_rejects("repeated_caption", len(fused))
    moved.check()
    assert moved.rejected == summary.rejected + len(fused)


# ------------------------------------------------------------------------------------------------------ all units


@given(st.lists(st.tuples(st.lists(rows, max_size=10), aparts), max_size=5))
def test_the_counts_of_a_dataset_are_the_sums_of_its_units(drawn):
    units = [summary_of(written, (*apart[:2], 0), engine_s=0.5) for written, apart in drawn]
    counts = Counts.of(units, sum(unit.planned for unit in units))
    assert counts.done == counts.planned
    assert counts.rows == {"planned": counts.planned} | {
        name: sum(unit.rows(name) for unit in units) for name in OUTCOMES
    }
    assert list(counts.rows) == ["planned", *OUTCOMES]
    everything = [row for written, _ in drawn for row in written]
    assert counts.reasons == Counter(row[1] for row in everything if row[0] == "rejected")
    assert counts.flags == Counter(flag for row in everything if row[0] != "rejected" for flag in row[2])
    assert sum(counts.filtered_by.values()) == counts.filtered
    assert counts.engine_s == 0.5 * len(units)
    assert counts.output_tokens == sum(row[4] for row in everything)


def test_a_missing_unit_shows():
    one = summary_of([("fused", None, [], 0, 0)])
    counts = Counts.of([one], planned=3)
    assert (counts.planned, counts.done) == (3, 1)


@given(st.lists(st.lists(rows, max_size=10), min_size=1, max_size=4), st.data())
def test_files_must_hold_what_the_units_count(drawn, data):
    units = [replace(summary_of(written), id=f"u{i}") for i, written in enumerate(drawn)]
    stored = {kind: [(unit.id, sum(unit.rows(name) for name in STORED[kind])) for unit in units] for kind in STORED}
    check_stored(units, stored, "group g00000")
    kind, number = data.draw(st.sampled_from(sorted(STORED))), data.draw(st.integers(0, len(units) - 1))
    unit_id, rows_ = stored[kind][number]
    pieces = [(unit_id, rows_ // 2), (unit_id, rows_ - rows_ // 2)]  # a unit may be in several files
    check_stored(units, stored | {kind: [*stored[kind][:number], *pieces, *stored[kind][number + 1 :]]}, "group g00000")
    for wrong in ([(unit_id, rows_ + 1)], [(unit_id, rows_), ("foreign", 1)]):
        files = [*stored[kind][:number], *wrong, *stored[kind][number + 1 :]]
        with pytest.raises(AccountingError, match=f"group g00000: {kind}/ does not hold the rows"):
            check_stored(units, stored | {kind: files}, "group g00000")


# ------------------------------------------------------------------------------ one place knows what is counted


def test_the_outcomes_agree_with_each_other():
    written = {str(outcome) for outcome in Outcome}
    assert {name for names in STORED.values() for name in names} == written
    assert written < set(OUTCOMES)
    assert set(OUTCOMES) < {field.name for field in fields(Counts)}


def lists_of_outcomes(source):
    """Lines of tuples, lists, sets and dicts that spell two outcomes or more."""
    for node in ast.walk(ast.parse(source)):
        keys = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", ())
        spelled = {key.value for key in keys if isinstance(key, ast.Constant)} & set(OUTCOMES)
        if len(spelled) > 1:
            yield node.lineno


def test_no_other_module_lists_the_outcomes():
    """Every consumer (manifest, totals, Prometheus, report, export, terminal) takes the list from OUTCOMES or Counts.rows."""
    assert list(lists_of_outcomes((ROOT / "capsfusion_ray/core/accounting.py").read_text("utf-8")))
    for path in (ROOT / "capsfusion_ray").rglob("*.py"):
        if path.name != "accounting.py":
            assert not list(lists_of_outcomes(path.read_text("utf-8"))), f"{path}: take it from accounting.OUTCOMES"
    for path in (ROOT / "capsfusion_ray").rglob("*.js"):
        spelled = re.findall(rf"""["'](?:{"|".join(OUTCOMES)})["']\s*,""", path.read_text("utf-8"))
        assert len(spelled) < 3, f"{path}: take the outcomes from the counts that the page gets"


# Adds a per-unit count to a copy of the package, in core/accounting.py alone, and runs outputs through the copy.
NEW_COUNT = """
import json, sys
from pathlib import Path
import capsfusion_ray
from capsfusion_ray.config import OutputConfig, VerifyConfig
from capsfusion_ray.core.accounting import summarise
from capsfusion_ray.core.plan import Plan, PlannedShard
from capsfusion_ray.core.unit_batch import UnitBatch
from capsfusion_ray.dataset.compaction import compact_group
from capsfusion_ray.dataset.manifest import assemble, read_manifest, swap_manifest
from capsfusion_ray.dataset.plan_files import write_plan
from capsfusion_ray.dataset.takedown import takedown
from capsfusion_ray.dataset.takedown_criteria import TakedownConfig
from capsfusion_ray.dataset.unit_files import commit, read_summaries
from capsfusion_ray.dataset.verify import verify
from capsfusion_ray.storage import Store
from outputs import FIELDS, part_of, units_of

work, old = Path(sys.argv[1]), sys.argv[2]
assert Path(capsfusion_ray.__file__).is_relative_to(work), capsfusion_ray.__file__
output = OutputConfig(str(work / "out"))
store, units = Store(output.path), units_of(2, 3, groups=1)
plan = Plan(1, {}, 3, FIELDS, tuple(units), tuple(PlannedShard(u.path, "c", 99, u.group) for u in units))
write_plan(store, plan)
for unit in units:
    part = part_of(unit, ["fused", "kept", "rejected"])
    commit(store, part, summarise(UnitBatch(unit, part, spent={"tokenizer_s": 1.5}), part))
assert [unit.tokenizer_s for unit in read_summaries(store, units)] == [1.5, 1.5]
swap_manifest(store, None, assemble([plan], [compact_group(store, "g00000", 1, units, FIELDS, output)], [{"revision": 1}]))
(work / "ids").write_text("s0.parquet:0")
takedown(TakedownConfig(output, row_ids=str(work / "ids")))
verify(VerifyConfig(output, deep=True))
assert read_manifest(store).counts.tokenizer_s == 3.0
assert read_manifest(Store(old)).counts.tokenizer_s == 0.0, "an output from before counts it as 0"
"""


def test_a_new_count_per_unit_needs_no_other_module(tmp_path):
    shutil.copytree(ROOT / "capsfusion_ray", tmp_path / "capsfusion_ray", ignore=shutil.ignore_patterns("__pycache__"))
    accounting = tmp_path / "capsfusion_ray" / "core" / "accounting.py"
    line = "    engine_s: float = measure(0.0)\n"
    text = accounting.read_text("utf-8")
    assert text.count(line) == 2, "once in UnitSummary, once in Counts"
    accounting.write_text(text.replace(line, f"{line}    tokenizer_s: float = measure(0.0)\n"), "utf-8")
    paths = f"{tmp_path}:{ROOT / 'tests' / 'support'}"
    command = [sys.executable, "-c", NEW_COUNT, str(tmp_path), str(FIXTURE / "finished")]
    done = subprocess.run(command, env={"PYTHONPATH": paths}, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
