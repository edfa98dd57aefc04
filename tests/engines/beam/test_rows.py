"""Rows, slots and refill: a caption does not depend on the other captions that are decoded with it."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCABULARY, beam_engine, drain, hf_texts, random_prompts, texts, tiny_llama

from capsfusion_ray.config import DecodeConfig
from capsfusion_ray.core.types import FinishReason, Prompt
from capsfusion_ray.engines.beam.cache import Cache
from capsfusion_ray.engines.beam.network import ROWS_TOGETHER
from capsfusion_ray.engines.beam.slots import LIKE, arrange

DECODE = DecodeConfig(num_beams=3, max_new_tokens=12)
MODEL = tiny_llama(11)
PROMPTS = random_prompts(random.Random(4), 14)


@pytest.fixture(scope="module")
def alone():
    return texts(drain(beam_engine(MODEL, DECODE, slots=1), PROMPTS))


@pytest.mark.parametrize("together", [1, 2, 16])
@pytest.mark.parametrize("slots", [2, 5, 20])
def test_the_slot_count_does_not_change_a_caption(alone, slots, together, monkeypatch):
    monkeypatch.setitem(ROWS_TOGETHER, "cpu", together)
    assert texts(drain(beam_engine(MODEL, DECODE, slots), PROMPTS)) == alone


def test_the_order_of_units_does_not_change_a_caption(alone):
    shuffled = random.Random(5).sample(PROMPTS, len(PROMPTS))
    assert texts(drain(beam_engine(MODEL, DECODE, slots=3), shuffled)) == alone


def test_two_runs_are_identical_to_the_last_bit_of_the_score():
    runs = [drain(beam_engine(MODEL, DECODE, slots=3), PROMPTS) for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("slots", [4, 9])
@pytest.mark.parametrize("shrinks", [True, False])
def test_prompts_that_stream_in_while_others_are_in_work_change_nothing(alone, monkeypatch, slots, shrinks):
    """Slots become free and are refilled, and rows move between slots. `shrinks` is False for bfloat16 models."""
    monkeypatch.setitem(ROWS_TOGETHER, "cpu", 2)
    monkeypatch.setattr("capsfusion_ray.engines.beam.slots.LIKE", 1)
    engine = beam_engine(MODEL, DECODE, slots)
    engine._shrinks = shrinks
    finished, waiting, rng = {}, list(PROMPTS), random.Random(6)
    while engine.unfinished or waiting:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if waiting:
                engine.submit([waiting.pop(0)])
        finished |= {generation.id: generation for generation in engine.step()}
    assert texts(finished) == alone


@pytest.mark.parametrize("slots", [1, 6, 30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_step_that_is_rehearsed_on_a_gpu_leaves_nothing_behind(dtype, slots, monkeypatch):
    """With more slots than prompts the idle rows take part in each step in bfloat16. Here the CPU rehearses the step."""
    model = tiny_llama(11, dtype=dtype)
    calm = drain(beam_engine(model, DECODE, slots), PROMPTS[:3])
    monkeypatch.setattr("capsfusion_ray.engines.beam.engine.REHEARSED_ON", {"cpu"})
    engine = beam_engine(model, DECODE, slots)
    assert drain(engine, PROMPTS[:1])[PROMPTS[0].id] == calm[PROMPTS[0].id]
    assert texts(drain(beam_engine(model, DECODE, slots), PROMPTS[:3])) == texts(calm)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("attention", ["torch", "triton"])
def test_on_a_gpu_captions_are_those_of_transformers_there(attention):
    model = tiny_llama(11, dtype=torch.float32, head_dim=16).to("cuda")
    assert texts(drain(beam_engine(model, DECODE, slots=5, attention=attention), PROMPTS)) == hf_texts(
        model, PROMPTS, DECODE
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("prompts", [1, 14])
def test_on_a_gpu_in_bfloat16_every_caption_comes_whatever_is_idle(prompts):
    model = tiny_llama(11, dtype=torch.bfloat16, head_dim=16).to("cuda")
    finished = [drain(beam_engine(model, DECODE, slots=9), PROMPTS[:prompts]) for _ in range(2)]
    assert finished[0] == finished[1]
    assert {generation.finish for generation in finished[0].values()} <= {FinishReason.EOS, FinishReason.LENGTH}


def test_the_batch_stays_full_while_work_is_queued():
    model = tiny_llama(11, eos_weight=4.0)  # its captions take 8 to 29 steps
    decode = DecodeConfig(num_beams=3, max_new_tokens=30)

    def steps(prompts, slots):
        engine = beam_engine(model, decode, slots)
        engine.submit(prompts)
        taken = 0
        while engine.unfinished:
            engine.step()
            taken += 1
        return taken

    alone = [steps([prompt], slots=1) for prompt in PROMPTS]
    static = sum(max(alone[i : i + 4]) for i in range(0, len(alone), 4))  # a batch waits for its longest caption
    refilled = steps(PROMPTS, slots=4)
    assert refilled < static
    # The bound of any schedule that never leaves a slot free while a caption waits (Graham, 1966).
    assert refilled <= (sum(alone) - max(alone)) / 4 + max(alone)


def test_another_prefix_waits_for_the_rows_in_work_and_is_right():
    other = random_prompts(random.Random(7), 3, prefix=2)
    other = [Prompt(f"other-{p.id}", "", "", "", p.prefix_ids, p.suffix_ids) for p in other]
    decode = DecodeConfig(num_beams=2, max_new_tokens=8, scoring="transformers")
    mixed = [*PROMPTS[:3], *other, *PROMPTS[3:5]]
    assert texts(drain(beam_engine(MODEL, decode, slots=4), mixed)) == hf_texts(MODEL, mixed, decode)


def test_a_prompt_over_the_budget_fails_alone(alone):
    long = Prompt("long", "", "", "", PROMPTS[0].prefix_ids, tuple(range(3, 30)))
    empty = Prompt("empty", "", "", "", PROMPTS[0].prefix_ids, ())
    finished = drain(beam_engine(MODEL, DECODE, slots=3), [*PROMPTS[:4], long, empty, *PROMPTS[4:]])
    for name in ("long", "empty"):
        assert finished[name].finish is FinishReason.ERROR
        assert name in finished.pop(name).error
    assert texts(finished) == alone


@pytest.mark.parametrize("beams", [1, 3])
def test_nan_scores_fail_their_row_alone_and_leave_nothing_in_its_slot(beams):
    model = tiny_llama(11)
    poison = VOCABULARY - 1
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = float("nan")
        model.lm_head.weight[poison] = 0
    clean = [Prompt(p.id, "", "", "", p.prefix_ids, tuple(min(i, poison - 1) for i in p.suffix_ids)) for p in PROMPTS]
    clean = [p for p in clean if poison not in p.prefix_ids]
    bad = Prompt("bad", "", "", "", PROMPTS[0].prefix_ids, (5, poison, 6))
    decode = DecodeConfig(num_beams=beams, max_new_tokens=8)
    want = drain(beam_engine(model, decode, slots=2), clean)
    finished = drain(beam_engine(model, decode, slots=2), [*clean[:3], bad, *clean[3:]])
    failed = finished.pop("bad")
    assert failed.finish is FinishReason.ERROR
    assert "NaN" in failed.error
    # A clean row may write the poisoned token. Then that row fails in both runs.
    assert finished == want


@given(st.data())
def test_rows_get_slots_beside_their_like_and_stay_where_they_are_among_them(data):
    slots, together = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 8))
    rows = data.draw(st.integers(0, slots))
    ends = data.draw(st.lists(st.integers(1, 300), min_size=rows, max_size=rows))
    live = data.draw(st.lists(st.integers(0, 30), max_size=rows, unique=True))
    found = arrange(ends, live, slots, together)
    assert len(set(found)) == rows
    assert set(found) <= set(range(slots))
    groups = [[ends[row] // LIKE for row in range(rows) if found[row] // together == group] for group in range(slots)]
    widths = [width for group in groups for width in sorted(group, reverse=True)]
    assert widths == sorted(widths, reverse=True)
    assert arrange(ends, found, slots, together) == found  # a second call moves no row


@settings(max_examples=30)
@given(beams=st.integers(1, 4), steps=st.integers(1, 12), suffix=st.integers(1, 5), seed=st.integers(0, 999))
def test_a_beam_sees_what_its_ancestors_wrote_and_no_column_is_taken_from_a_beam(beams, steps, suffix, seed):
    rng = random.Random(seed)
    columns = suffix + beams * steps
    cache = Cache([], [], torch.zeros(1, beams, columns, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))
    cache.open_rows(torch.tensor([0]), torch.tensor([suffix]))
    want = [set(range(suffix)) for _ in range(beams)]
    end = suffix
    for _ in range(steps):
        end = min(end + beams, columns)  # the upper bound that the engine knows without reading from the device
        written = cache.claim(1, end)[0].tolist()
        assert len(set(written)) == beams
        assert not set(written) & set.union(*want)
        parents = [rng.randrange(beams) for _ in range(beams)]
        want = [want[parent] | {written[parent]} for parent in parents]
        cache.reorder(torch.tensor([parents]), torch.tensor([False]), end)
        seen = [set(row.nonzero()[:, 0].tolist()) for row in cache.visible_BKN[0]]
        assert seen == want
        assert cache.ends(1, end).tolist() == [1 + max(set.union(*want))]
        end = rng.choice([end, cache.ends(1, end).item()])
    cache.reorder(torch.tensor([parents]), torch.tensor([True]), end)
    assert not cache.visible_BKN.any()


def test_output_tokens_and_finish_say_how_a_caption_ended():
    for generation in drain(beam_engine(MODEL, DECODE, slots=3), PROMPTS).values():
        count = len(generation.text.split())
        assert generation.output_tokens == count
        assert generation.finish is (FinishReason.LENGTH if count == DECODE.max_new_tokens else FinishReason.EOS)
        assert generation.prompt_tokens > 0


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    beams=st.sampled_from([1, 2, 3, 4]),
    cap=st.integers(1, 14),
    penalty=st.sampled_from([0.0, 0.6, 1.0, 1.8, -0.3]),
    slots=st.integers(1, 6),
    eos_weight=st.sampled_from([1.0, 2.0, 3.0]),
)
def test_any_small_model_cap_and_penalty_matches_transformers(seed, beams, cap, penalty, slots, eos_weight):
    rng = random.Random(seed)
    model = tiny_llama(seed, eos_weight)
    prompts = random_prompts(rng, 4, prefix=rng.choice([0, 3, 16, 20]))
    decode = DecodeConfig(num_beams=beams, max_new_tokens=cap, scoring="transformers", length_penalty=penalty)
    assert texts(drain(beam_engine(model, decode, slots), prompts)) == hf_texts(model, prompts, decode)
