"""The echo engine writes faults as often as the published captions have them, and the gates find them."""

import random
from collections import Counter

import pytest

from capsfusion_ray.config import GatesConfig
from capsfusion_ray.core.gates import judge_text
from capsfusion_ray.core.types import FinishReason
from capsfusion_ray.engines.echo import FAULTS, write

ROWS = 40_000
NAMES = ["Lisbon", "Oslo", "Anna", "Peter", "Nikon", "Ford", "Canon", "Maria", "Berlin", "Turin", "Yamaha", "Rolex"]
THINGS = [
    "bicycle",
    "lamp",
    "jacket",
    "camera",
    "poster",
    "table",
    "guitar",
    "watch",
    "kettle",
    "mirror",
    "carpet",
    "engine",
]
KINDS = [
    "wooden",
    "red",
    "vintage",
    "leather",
    "small",
    "bright",
    "folding",
    "striped",
    "electric",
    "heavy",
    "garden",
    "kitchen",
]
PLACES = ("on a white background", "in front of a brick wall", "next to a window", "on the floor of a large room")

# Each fault and the gate that must find it: none of them is found in a faultless caption of these pairs.
GATE_OF = {name: name for name in FAULTS} | {
    "phrase of the instruction": "instruction_echo",
    "begun inside a sentence": "cut_off",
    "stopped at the limit": "cut_off",
}


@pytest.fixture(scope="module")
def found():
    """Of many pairs, how often each gate rejected, and how often it matched."""
    draw = random.Random(1)
    rejected, matched = Counter(), Counter()
    for n in range(ROWS):
        thing, kind = draw.choice(THINGS), draw.choice(KINDS)
        raw = (
            f"{draw.choice(NAMES)} {draw.choice(NAMES)} {kind} {thing} No. {n} {draw.choice(KINDS)} edition in its box"
        )
        synthetic = f"a {kind} {thing} {draw.choice(PLACES)}"
        caption = write(raw, synthetic)
        finish = FinishReason.EOS if caption.ended else FinishReason.LENGTH
        verdict = judge_text(raw, synthetic, caption.text, finish, GatesConfig())
        rejected[verdict.reason] += 1
        matched.update({*verdict.flags, verdict.reason} - {None})
    return rejected, matched


def test_each_gate_matches_as_often_as_in_the_published_captions(found):
    _, matched = found
    for gate in sorted(set(GATE_OF.values())):
        rate = sum(FAULTS[name] for name, found_by in GATE_OF.items() if found_by == gate)
        deviation = (rate / ROWS) ** 0.5
        assert abs(matched[gate] / ROWS - rate) < 4 * deviation, (gate, matched[gate] / ROWS, rate)


def test_rows_are_rejected_as_often_as_published_ones(found):
    rejected, _ = found
    assert {reason for reason in rejected if reason} == {"instruction_echo", "unsupported_number", "cut_off"}
    assert 0.017 < sum(count for reason, count in rejected.items() if reason) / ROWS < 0.025


def test_the_same_pair_gets_the_same_caption():
    assert write(" A lamp. ", "a red lamp") == write("A lamp", "a red lamp.")
    assert write("", "").text
    assert write("\ud800", "x").text
