"""What the gates find in the published captions, and how often a reader agrees. Needs ../shared/data; skipped without."""

import csv
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from capsfusion_ray.config import FuseConfig, GatesConfig, parse_config
from capsfusion_ray.core.gates import GATES, is_boilerplate, judge_sources, judge_table
from capsfusion_ray.core.types import Reason

DATA = Path(__file__).parents[4] / "shared/data/capsfusion_pairs_8000.json"
LABELS = Path(__file__).with_name("published_labels.csv")
PAIRS = Path(__file__).with_name("published_pairs.csv")
DOCS = Path(__file__).parents[3] / "docs/gates.md"
STRICT = DOCS.parents[1] / "conf/gates/strict.yaml"
BLIND = "blind"  # read before it was known what the gates say

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


def read(path):
    with path.open(newline="") as file:
        return {int(row["row"]): row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def labels():
    return {row: set(label["faults"].split()) for row, label in read(LABELS).items()}


@pytest.fixture(scope="module")
def blind(labels):
    return {row: labels[row] for row, label in read(LABELS).items() if label["drawn_for"] == BLIND}


@pytest.fixture(scope="module")
def mismatched(captions):
    """The rows whose sources share no content word, as the policy asks."""
    gates = GatesConfig(mismatched_pair="reject")
    verdicts = [judge_sources(raw, synthetic, gates) for raw, synthetic in zip(*captions[:2], strict=True)]
    return {row for row, verdict in enumerate(verdicts) if verdict and verdict.reason is Reason.MISMATCHED_PAIR}


def share(n, captions):
    return 100 * n / len(captions[0])


def test_at_most_three_percent_are_rejected_by_default(captions, verdicts):
    reasons = Counter(v.reason for v in verdicts if v.reason)
    print("rejected", dict(reasons), "flagged", sum(bool(v.flags) for v in verdicts))
    assert share(sum(reasons.values()), captions) <= 3.0


# docs/gates.md has the same figures. Rate in percent of the 8,000, with the tolerance of a word list that grows.
RATES = {
    Reason.INSTRUCTION_ECHO: (4.3, 0.3),  # SPEC: 3.6, which counts fewer phrases
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


def hits(matched, labels):
    """By reason: true and false hits, and faults that were missed."""
    table = {}
    for reason, _ in GATES:
        said = {row for row, faults in labels.items() if reason.value in faults}
        found = {row for row in labels if reason in matched[row]}
        table[reason] = (len(said & found), len(found - said), len(said - found))
    return table


def test_precision_and_recall_against_what_a_reader_said(matched, labels, blind):
    assert len(labels) >= 200
    assert len(blind) >= 100
    table, unseen = hits(matched, labels), hits(matched, blind)
    for reason, (true, false, missed) in table.items():
        print(f"{reason.value:20} true {true:3} false {false:3} missed {missed:3}   read blind {unseen[reason]}")
    for reason in (Reason.INSTRUCTION_ECHO, Reason.CUT_OFF, Reason.UNSUPPORTED_NUMBER):  # those that reject
        true, false, missed = table[reason]
        assert true / (true + false) >= 0.9, reason
        assert true / (true + missed) >= 0.9, reason


def test_ordinary_captions_are_not_rejected(verdicts, labels):
    ordinary = [row for row, faults in labels.items() if not faults]
    rejected = [row for row in ordinary if verdicts[row].reason]
    assert len(rejected) <= 0.03 * len(ordinary), rejected


def test_a_pair_without_a_common_word_is_seldom_mismatched(mismatched):
    said = {row: label["mismatched"] == "yes" for row, label in read(PAIRS).items()}
    true, false = (sum(row in mismatched and said[row] is wrong for row in said) for wrong in (True, False))
    missed = sum(said[row] and row not in mismatched for row in said)
    print(f"mismatched_pair true {true} false {false} missed {missed}")
    assert true + false >= 100
    assert true < 0.1 * (true + false), "so the default must not drop them"
    assert GatesConfig().mismatched_pair == "fuse"


# ---------------------------------------------------------------------------------------------- what the docs say of it


def rows_of_table(heading):
    """First column in back ticks -> the other cells, of the table below a heading of docs/gates.md."""
    section = DOCS.read_text("utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    assert section, heading
    return {
        name: [cell.strip() for cell in cells.split("|")]
        for name, cells in re.findall(r"^\| `(\w+)` \|(.*)\|$", section, re.MULTILINE)
    }


def test_the_table_of_the_gates_is_what_they_find(captions, verdicts, matched, labels):
    said = rows_of_table("After the engine")
    read_of = hits(matched, labels)
    reasons = Counter(v.reason for v in verdicts if v.reason)
    for reason, _ in GATES:
        n = sum(reason in m for m in matched)
        percent = f" ({share(n, captions):.1f}%)" if n else ""
        assert said[reason.value][-5:] == [f"{n}{percent}", *map(str, (reasons[reason], *read_of[reason]))], reason
    assert len(said) == len(GATES)
    rejected, flagged = sum(reasons.values()), sum(bool(v.flags) for v in verdicts)
    text = " ".join(DOCS.read_text("utf-8").split())
    assert f"Together {rejected} of 8,000 ({share(rejected, captions):.1f}%) are rejected and {flagged} flagged" in text
    faulty = [bool(labels[row]) for row in labels if verdicts[row].reason]
    faultless = [verdicts[row].reason for row, faults in labels.items() if not faults]
    assert f"of {len(faulty)} rejected rows read, {sum(faulty)} were faulty" in text
    assert f"of {len(faultless)} faultless rows read, {sum(map(bool, faultless))} was rejected" in text
    strict = judge_table(*captions, parse_config(FuseConfig, [str(STRICT)], complete=False).gates)
    assert f"`conf/gates/strict.yaml` rejects {share(sum(bool(v.reason) for v in strict), captions):.1f}%" in text


def test_the_table_of_the_blind_reading_is_what_the_gates_find_there(matched, blind):
    said = rows_of_table("Read blind")
    assert f"{len(blind)} of the rows that no one had read" in DOCS.read_text("utf-8")
    assert f"looked up what the gates say: {sum(map(bool, blind.values()))} had a fault" in DOCS.read_text("utf-8")
    want = {reason.value: list(map(str, counts)) for reason, counts in hits(matched, blind).items() if any(counts)}
    assert {name: cells[:3] for name, cells in said.items() if name in want} == want
    assert said.keys() == want.keys()


def test_the_table_of_the_pairs_is_what_the_policies_find(captions, mismatched):
    said = rows_of_table("Before the engine")
    assert said["boilerplate"][-3] == str(sum(map(is_boilerplate, captions[0])))
    assert said["mismatched_pair"][-3] == f"{share(len(mismatched), captions):.1f}%"
    labels = {row: label["mismatched"] == "yes" for row, label in read(PAIRS).items()}
    assert said["mismatched_pair"][-2:] == [
        str(sum(labels[row] is wrong for row in labels if row in mismatched)) for wrong in (True, False)
    ]
