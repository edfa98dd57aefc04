"""What the gates find in the published captions, and how often a reader agrees. Needs ../shared/data; skipped without."""

import csv
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from capsfusion_ray.config import GatesConfig
from capsfusion_ray.gates import GATES, judge_table
from capsfusion_ray.rows import Reason

DATA = Path(__file__).parents[3] / "shared/data/capsfusion_pairs_8000.json"
LABELS = Path(__file__).with_name("published_labels.csv")

pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"NOT CHECKED: no published captions at {DATA}")


@pytest.fixture(scope="module")
def captions():
    rows = json.loads(DATA.read_text())
    return [[row[key] for row in rows] for key in ("laion_2b", "laion_coco", "capsfuion_official")]


@pytest.fixture(scope="module")
def verdicts(captions):
    return judge_table(*captions, GatesConfig())


@pytest.fixture(scope="module")
def matched(verdicts):
    return [{v.reason, *v.flags} - {None} for v in verdicts]


@pytest.fixture(scope="module")
def labels():
    with LABELS.open(newline="") as file:
        return {int(row["row"]): set(row["faults"].split()) for row in csv.DictReader(file)}


def share(n, captions):
    return 100 * n / len(captions[0])


def test_at_most_three_percent_are_rejected_by_default(captions, verdicts):
    reasons = Counter(v.reason for v in verdicts if v.reason)
    print("rejected", dict(reasons), "flagged", sum(bool(v.flags) for v in verdicts))
    assert share(sum(reasons.values()), captions) <= 3.0


# docs/gates.md has the same figures. Rate in percent of the 8,000, with the tolerance of a word list that grows.
RATES = {
    Reason.INSTRUCTION_ECHO: (4.2, 0.3),  # SPEC: 3.6, which counts fewer phrases
    Reason.CUT_OFF: (3.4, 0.3),  # SPEC: 2.6 without a full stop; 0.5 more begin inside a sentence
    Reason.UNSUPPORTED_NUMBER: (0.2, 0.1),  # SPEC: 1.0, before other forms of the same number are known
    Reason.REPETITION: (0.2, 0.1),  # from a tenth of the 4-grams; SPEC: 1.1 with any 4-gram twice
    Reason.CONCATENATION: (0.45, 0.15),  # SPEC: 0.7
}


@pytest.mark.parametrize("reason", list(RATES))
def test_the_rate_of_each_fault_is_as_documented(reason, captions, matched):
    rate, tolerance = RATES[reason]
    assert share(sum(reason in m for m in matched), captions) == pytest.approx(rate, abs=tolerance)


def test_the_crude_measures_of_the_fault_table_are_reproduced(captions):
    """The table's own way of counting, without the gates: so the differences above are the gates', not the data's."""
    raw, synthetic, fused = captions
    no_stop = sum(f.rstrip()[-1:] not in '.!?"' for f in fused)
    assert share(no_stop, captions) == pytest.approx(2.96, abs=0.01)  # the table: 2.6, of 10,000
    foreign = sum(
        not set(re.findall(r"\d+", f)) <= set(re.findall(r"\d+", f"{r} {s}"))
        for r, s, f in zip(raw, synthetic, fused, strict=True)
    )
    assert share(foreign, captions) == pytest.approx(0.58, abs=0.01)  # the table: 1.0
    echo = sum("real-world" in f or "entence 2" in f or "entence structure" in f for f in fused)
    assert share(echo, captions) == pytest.approx(4.03, abs=0.01)  # the table: 3.6
    runs = [f.lower().split() for f in fused]
    grams = [list(zip(w, w[1:], w[2:], w[3:], strict=False)) for w in runs]
    assert share(sum(len(g) > len(set(g)) for g in grams), captions) == pytest.approx(0.71, abs=0.01)  # the table: 1.1
    kept = [(set(re.findall(r"\d+", r)), set(re.findall(r"\d+", f))) for r, f in zip(raw, fused, strict=True)]
    assert sum(len(a & b) for a, b in kept) / sum(len(a) for a, _ in kept) == pytest.approx(0.866, abs=0.005)  # .855


def test_precision_and_recall_against_what_a_reader_said(matched, labels):
    assert len(labels) >= 200
    table = {}
    for reason, _ in GATES:
        said = {row for row, faults in labels.items() if reason.value in faults}
        found = {row for row in labels if reason in matched[row]}
        table[reason] = (len(said & found), len(found - said), len(said - found))
        print(f"{reason.value:20} true {table[reason][0]:3} false {table[reason][1]:3} missed {table[reason][2]:3}")
    for reason in (Reason.INSTRUCTION_ECHO, Reason.CUT_OFF, Reason.UNSUPPORTED_NUMBER):  # those that reject
        true, false, missed = table[reason]
        assert true / (true + false) >= 0.9, reason
        assert true / (true + missed) >= 0.9, reason


def test_ordinary_captions_are_not_rejected(verdicts, labels):
    ordinary = [row for row, faults in labels.items() if not faults]
    rejected = [row for row in ordinary if verdicts[row].reason]
    assert len(rejected) <= 0.03 * len(ordinary), rejected
