"""The gates: what is rejected, flagged and let through by default, by which policy, and for any text."""

import dataclasses
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capsfusion_ray.config import GateConfig, GatesConfig
from capsfusion_ray.core.gates import GATES, judge, judge_pair, judge_sources, judge_table, judge_text, kept_text
from capsfusion_ray.core.gates.triple import MAX_DETAIL, MAX_READ
from capsfusion_ray.core.types import CaptionPair, FinishReason, Generation, Outcome, Reason
from capsfusion_ray.errors import ConfigError

DEFAULT = GatesConfig()
RAW = "New 2019 Porsche 911 Carrera, Stuttgart"
SYNTHETIC = "A red car parked on the street."
GOOD = "A new red 2019 Porsche 911 Carrera is parked on a street in Stuttgart."
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=120)


def matched(fused, raw=RAW, synthetic=SYNTHETIC, finish=FinishReason.EOS, gates=DEFAULT):
    verdict = judge_text(raw, synthetic, fused, finish, gates)
    return {verdict.reason, *verdict.flags} - {None}


def pair(raw, synthetic=SYNTHETIC):
    return CaptionPair("a.parquet:0", raw, synthetic)


# ------------------------------------------------------------------------------------------------ after the engine


def test_a_good_caption_passes_without_a_flag():
    verdict = judge(pair(RAW), Generation("0", GOOD, FinishReason.EOS), DEFAULT)
    assert (verdict.outcome, verdict.reason, verdict.detail, verdict.flags) == (Outcome.FUSED, None, "", ())


@pytest.mark.parametrize(
    ("fused", "reason"),
    [
        ("", Reason.EMPTY_OUTPUT),
        (" \n\t", Reason.EMPTY_OUTPUT),
        ("?!…", Reason.EMPTY_OUTPUT),
        ("A red car, as depicted in Sentence 2.", Reason.INSTRUCTION_ECHO),
        ("The red car exhibits nice sentence structure.", Reason.INSTRUCTION_ECHO),
        ("New Sentence: a red Porsche 911.", Reason.INSTRUCTION_ECHO),
        ("The Porsche 911 lacks in-depth information.", Reason.INSTRUCTION_ECHO),
        ("A Porsche 911, while a red car is not an accurate description of it.", Reason.INSTRUCTION_ECHO),
        ("a red car and a red car and a red car and a red car and a red car.", Reason.REPETITION),
        ("the the the the the the the the the the the the", Reason.REPETITION),
        ("Красная машина на улице", Reason.WRONG_SCRIPT),
        ("Der rote Wagen mit dem Stern steht auf der Straße und ist von 2019.", Reason.WRONG_SCRIPT),
        ("The 2018 Porsche 911 Carrera is a red car.", Reason.UNSUPPORTED_NUMBER),
    ],
)
def test_these_captions_are_rejected_by_default_for_this_reason(fused, reason):
    verdict = judge_text(RAW, SYNTHETIC, fused, FinishReason.EOS, DEFAULT)
    assert (verdict.outcome, verdict.reason) == (Outcome.REJECTED, reason)
    assert verdict.detail


@pytest.mark.parametrize(
    "raw", ["Kleid von Prada für den Sommer", "Robe de plage pour les femmes", "Vestido de la playa para el verano"]
)
def test_an_english_caption_is_accepted_for_an_alt_text_in_any_language(raw):
    """The captioner writes English, and some of its sentences have no function word of the list."""
    synthetic = "a woman in a white dress standing on a beach"
    fused = "The woman on a beach is wearing a white summer dress that is perfect for the season."
    verdict = judge_text(raw, synthetic, fused, FinishReason.EOS, DEFAULT)
    assert (verdict.outcome, verdict.reason) == (Outcome.FUSED, None)
    foreign = judge_text(raw, "une femme dans la robe blanche sur une plage", fused, FinishReason.EOS, DEFAULT)
    assert foreign.reason is Reason.WRONG_SCRIPT


@pytest.mark.parametrize(
    ("raw", "fused"),
    [
        ("House price 1500000 USD", "The house costs 1,500,000 USD."),
        ("Built for 3.500.000 EUR", "It was built for 3,500,000 EUR."),
    ],
)
def test_a_number_in_another_notation_is_the_same_number(raw, fused):
    assert judge_text(raw, "a house with a garden", fused, FinishReason.EOS, DEFAULT).reason is None
    wrong = judge_text(raw.replace("500", "400"), "a house with a garden", fused, FinishReason.EOS, DEFAULT)
    assert wrong.reason is Reason.UNSUPPORTED_NUMBER


@pytest.mark.parametrize(
    ("fused", "reason"),
    [
        ("The Porsche 911 provides detailed real-world knowledge.", Reason.INSTRUCTION_ECHO),
        (f"{RAW}. {SYNTHETIC}", Reason.CONCATENATION),
        (RAW, Reason.COPY_OF_ONE),
        (SYNTHETIC, Reason.COPY_OF_ONE),
        ("A red car designed by Ferdinand is parked in Stuttgart, a Porsche 911 Carrera.", Reason.UNSUPPORTED_NAME),
        ("A red car parked on the street in the sun.", Reason.LOST_ENTITY),
    ],
)
def test_these_captions_are_flagged_by_default(fused, reason):
    verdict = judge_text(RAW, SYNTHETIC, fused, FinishReason.EOS, DEFAULT)
    assert verdict.outcome is Outcome.FUSED
    assert reason in verdict.flags


def test_cut_off_follows_the_finish_and_looks_for_a_full_stop_if_that_is_unknown():
    assert Reason.CUT_OFF in matched(GOOD, finish=FinishReason.LENGTH)
    assert Reason.CUT_OFF not in matched(GOOD[:-1], finish=FinishReason.EOS)
    assert Reason.CUT_OFF in matched(GOOD[:-1], finish=None)
    assert Reason.CUT_OFF not in matched('It says "911".', finish=None)


def test_a_caption_that_continues_a_cut_synthetic_one_is_rejected():
    verdict = judge_text("Porsche", "A car parked in front of", "a Porsche house.", FinishReason.EOS, DEFAULT)
    assert verdict.reason is Reason.CUT_OFF


def test_a_phrase_or_a_repetition_of_a_source_is_no_fault():
    echo = "A workbook on sentence structure."
    assert Reason.INSTRUCTION_ECHO not in matched(echo, raw="Sentence structure workbook", synthetic="A book.")
    loop = "go on and on and on and on and on and on"
    assert Reason.REPETITION not in matched(loop, raw=loop)


@pytest.mark.parametrize(
    ("fused", "raw"),
    [
        ("It costs 185,000 euros.", "185 000€"),
        ("Taken in 2005.", "23/07/05"),
        ("Taken on June 8, 2011.", "20110608-xzibit"),
        ("It starts at 8:15.", "8.15 p.m."),
        ("It has 3 wheels.", "three wheels"),
        ("It is 64 GB.", "64GB"),
        ("In the 1960s.", "1960's"),
    ],
)
def test_a_number_in_another_form_is_supported(fused, raw):
    assert Reason.UNSUPPORTED_NUMBER not in matched(fused, raw=raw)


@pytest.mark.parametrize(
    ("fused", "raw"),
    [
        ("It shows an American flag.", "America"),
        ("A view of New York City.", "NYC view"),
        ("Sold in the United States.", "sold in the U.S."),
        ("Seen in California.", "Los Angeles, CA"),
        ("The brand is John Lewis.", "johnlewis.com"),
        ("It was in December.", "25/12/2019"),
        ("A portrait of Jaromir.", "Jaromír"),
        ("The Spanish coast.", "coast of Spain"),
        ("It is the International Association of Athletics Federations.", "IAAF unveils"),
    ],
)
def test_a_name_in_another_form_is_supported(fused, raw):
    assert Reason.UNSUPPORTED_NAME not in matched(fused, raw=raw, synthetic="a picture")


def test_the_detail_names_the_value():
    verdict = judge_text(RAW, SYNTHETIC, "A 912 car.", FinishReason.EOS, DEFAULT)
    assert verdict.detail == "'912' is in neither source"


def test_the_first_rejecting_gate_names_the_reason_and_the_others_are_flags():
    text = "A 912 car as depicted in Sentence 2, by Ferdinand."
    verdict = judge_text(RAW, SYNTHETIC, text, FinishReason.LENGTH, DEFAULT)
    assert verdict.reason is Reason.INSTRUCTION_ECHO
    assert {Reason.UNSUPPORTED_NUMBER, Reason.CUT_OFF} <= set(verdict.flags)


def test_an_engine_error_is_a_reject_with_the_error_as_detail():
    verdict = judge(pair(RAW), Generation("0", "", FinishReason.ERROR, error="NaN scores\nat step 3"), DEFAULT)
    assert (verdict.reason, verdict.detail) == (Reason.ENGINE_ROW_ERROR, "NaN scores at step 3")


@pytest.mark.parametrize("reason", [name for name, _ in GATES])
def test_every_gate_can_be_ignored_flagged_or_rejected(reason):
    fused = {Reason.EMPTY_OUTPUT: "", Reason.TOO_SHORT: "Car.", Reason.WRONG_SCRIPT: "Красная"}.get(
        reason,
        f"{GOOD} {RAW} {SYNTHETIC} Sentence 2 in 1234 by Ferdinand and by Ferdinand and by Ferdinand and by " * 3,
    )
    fused = {
        Reason.LOST_ENTITY: "A car.",
        Reason.COPY_OF_ONE: SYNTHETIC,
        Reason.CONCATENATION: RAW + " " + SYNTHETIC,
    }.get(reason, fused)
    none = {name.value: GateConfig("ignore", 0.01) for name, _ in GATES}
    for action in ("ignore", "flag", "reject"):
        gates = GatesConfig(**{**none, reason.value: GateConfig(action, 0.01)})
        verdict = judge_text(RAW, SYNTHETIC, fused, FinishReason.LENGTH, gates)
        assert verdict.reason == (reason if action == "reject" else None)
        assert verdict.flags == ((reason,) if action == "flag" else ())


def test_an_empty_output_that_is_only_flagged_is_judged_by_the_other_gates():
    gates = GatesConfig(empty_output=GateConfig("flag", 1))
    for raw in (RAW, "Cat", ""):
        verdict = judge_text(raw, "A cat.", "", FinishReason.EOS, gates)
        assert verdict.outcome is Outcome.REJECTED
        assert verdict.reason is Reason.TOO_SHORT
        assert Reason.EMPTY_OUTPUT in verdict.flags


def test_thresholds_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"gates\.too_long\.threshold=0"):
        GatesConfig(too_long=GateConfig("flag", 0))
    with pytest.raises(ConfigError, match=r"gates\.too_long\.flag_from=2"):
        GatesConfig(too_long=GateConfig("reject", 1, 2))


def test_gates_and_config_name_the_same_reasons():
    fields = {f.name for f in dataclasses.fields(GatesConfig)}
    pairs = {Reason.NULL_CAPTION, Reason.EMPTY_CAPTION, Reason.BOILERPLATE, Reason.MISMATCHED_PAIR}
    over_the_run = {Reason.REPEATED_CAPTION}  # judged at compaction: core/repeated_captions.py
    assert fields == {name.value for name, _ in GATES} | {r.value for r in pairs | over_the_run}


# ------------------------------------------------------------------------------------------------ before the engine


@pytest.mark.parametrize(
    ("raw", "synthetic", "outcome", "reason"),
    [
        (None, SYNTHETIC, Outcome.REJECTED, Reason.NULL_CAPTION),
        (RAW, None, Outcome.REJECTED, Reason.NULL_CAPTION),
        ("", SYNTHETIC, Outcome.REJECTED, Reason.EMPTY_CAPTION),
        (RAW, " --- ", Outcome.REJECTED, Reason.EMPTY_CAPTION),
        ("caf\ud800", SYNTHETIC, Outcome.REJECTED, Reason.INVALID_UTF8),
        ("IMG_1234.jpg", SYNTHETIC, Outcome.KEPT, Reason.BOILERPLATE),
        ("thumbnail", "image", Outcome.REJECTED, Reason.BOILERPLATE),
    ],
)
def test_pairs_that_never_reach_the_engine(raw, synthetic, outcome, reason):
    verdict = judge_pair(pair(raw, synthetic), DEFAULT)
    assert verdict is not None
    assert (verdict.outcome, verdict.reason) == (outcome, reason)
    assert verdict.detail


@pytest.mark.parametrize(
    "raw", ["image", "DSC00012", "Click to enlarge", "12345", "img20160502.png", "5f3a9c2e11", "Untitled-1"]
)
def test_boilerplate_keeps_the_synthetic_caption(raw):
    verdict = judge_pair(pair(raw), DEFAULT)
    assert verdict is not None
    assert verdict.reason is Reason.BOILERPLATE
    assert kept_text(raw, SYNTHETIC, verdict.reason, DEFAULT) == SYNTHETIC


@pytest.mark.parametrize(
    "raw", ["Giraffe-Drinking-Water-Images-540x337", "Easter09", "KMR 1200", "BMW engine", "写真 猫"]
)
def test_a_file_name_that_says_something_is_fused(raw):
    assert judge_pair(pair(raw), DEFAULT) is None


def test_a_mismatched_pair_is_fused_by_default_and_routed_by_policy():
    raw, synthetic = "Maths workbook", "A man in a jacket."
    assert judge_sources(raw, synthetic, DEFAULT) is None
    for policy, outcome in (("reject", Outcome.REJECTED), ("keep_raw", Outcome.KEPT), ("keep_synthetic", Outcome.KEPT)):
        gates = GatesConfig(mismatched_pair=policy)
        verdict = judge_sources(raw, synthetic, gates)
        assert verdict is not None
        assert (verdict.outcome, verdict.reason) == (outcome, Reason.MISMATCHED_PAIR)
        assert judge_sources(RAW, "A red Porsche", gates) is None
    assert kept_text(raw, synthetic, Reason.MISMATCHED_PAIR, GatesConfig(mismatched_pair="keep_raw")) == raw
    gates = GatesConfig(mismatched_pair="flag", boilerplate="flag")
    assert judge_sources("image", synthetic, gates) is None
    assert {Reason.MISMATCHED_PAIR, Reason.BOILERPLATE} <= matched("A man.", "image", synthetic, gates=gates)


def test_a_policy_keeps_the_other_caption_if_one_is_missing():
    gates = GatesConfig(null_caption="keep_synthetic", empty_caption="keep_raw")
    assert judge_sources(None, SYNTHETIC, gates).outcome is Outcome.KEPT
    assert judge_sources(RAW, None, gates).outcome is Outcome.REJECTED
    assert judge_sources(RAW, "", gates).outcome is Outcome.KEPT


# ------------------------------------------------------------------------------------------------ any text


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT, ANY_TEXT, ANY_TEXT, st.sampled_from([None, *FinishReason]))
def test_judge_never_raises_and_is_deterministic(raw, synthetic, fused, finish):
    gates = GatesConfig(boilerplate="flag", mismatched_pair="flag")
    first = judge_text(raw, synthetic, fused, finish, gates)
    assert first == judge_text(raw, synthetic, fused, finish, gates)
    assert len(first.detail) <= MAX_DETAIL
    first.detail.encode()
    assert "\n" not in first.detail
    assert first.reason not in first.flags
    assert (first.outcome is Outcome.REJECTED) == (first.reason is not None)
    pre = judge_sources(raw, synthetic, DEFAULT)
    assert pre is None or pre.outcome in (Outcome.KEPT, Outcome.REJECTED)


@pytest.mark.timeout(300)  # a gate that is quadratic in the length would take hours
@pytest.mark.parametrize("unit", ["a", "ab ", "1,", "猫", "Ab ", "\u0301", "' ", "A", "1a"])
def test_a_megabyte_is_judged_in_bounded_time(unit):
    text = (unit * 1_000_000)[:1_000_000]
    head = text[: MAX_READ + 1]  # the fused caption is stripped before it is cut
    began = time.process_time()
    assert judge_text(text, text, text, None, DEFAULT) == judge_text(head, head, head, None, DEFAULT)
    assert judge_text(RAW, SYNTHETIC, text, None, DEFAULT) == judge_text(RAW, SYNTHETIC, head, None, DEFAULT)
    assert judge_sources(text, text, DEFAULT) == judge_sources(head, head, DEFAULT)
    assert time.process_time() - began < 60, "seconds; it takes about one"


def test_a_table_is_judged_as_its_rows():
    texts = [GOOD, "", "A 912 car.", "As in Sentence 2."]
    got = judge_table([RAW] * 4, [SYNTHETIC] * 4, texts, DEFAULT)
    assert got == [judge_text(RAW, SYNTHETIC, text, None, DEFAULT) for text in texts]
