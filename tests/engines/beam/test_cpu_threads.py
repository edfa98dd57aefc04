"""Engines side by side on a CPU: the captions of one engine, whatever their number."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import beam_engine, drain, loaded, random_prompts, texts, tiny_llama

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.core.types import FinishReason, Prompt
from capsfusion_ray.engines.base import build_engine
from capsfusion_ray.engines.beam.cpu_threads import Lanes, side_by_side
from capsfusion_ray.engines.beam.engine import BeamEngine
from capsfusion_ray.errors import EngineError

DECODE = DecodeConfig(num_beams=3, max_new_tokens=12)
MODEL = tiny_llama(11)
PROMPTS = random_prompts(random.Random(4), 14)


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone():
    return texts(drain(beam_engine(MODEL, DECODE, slots=1), PROMPTS))


def lanes(threads, slots, model=MODEL):
    torch.set_num_threads(threads)
    return side_by_side(loaded(model), EngineConfig(slots=slots, max_prompt_tokens=32), DECODE)


@pytest.mark.parametrize(
    ("threads", "slots", "each"), [(2, 6, [3, 3]), (3, 7, [3, 3, 3]), (4, 2, [1, 1]), (2, None, [96, 96])]
)
def test_lanes_write_what_one_engine_writes(alone, threads, slots, each):
    engine = lanes(threads, slots)
    assert isinstance(engine, Lanes)
    assert torch.get_num_threads() == 1, "one for each lane"
    assert texts(drain(engine, PROMPTS)) == alone
    assert engine.load.room == sum(each)
    assert engine.load.busy == 0


def test_one_thread_or_one_slot_is_one_engine(alone):
    for engine in (lanes(1, 6), lanes(4, 1)):
        assert isinstance(engine, BeamEngine)
        assert texts(drain(engine, PROMPTS)) == alone


def test_rows_that_stream_in_are_shared_out_and_counted(alone):
    engine, finished, waiting = lanes(2, 4), {}, list(PROMPTS)
    while engine.unfinished or waiting:
        engine.submit(waiting[:3])
        del waiting[:3]
        finished |= {generation.id: generation for generation in engine.step()}
        assert engine.unfinished + len(finished) + len(waiting) == len(PROMPTS)
        if waiting:
            assert all(lane.unfinished for lane in engine._lanes)
    assert texts(finished) == alone


def test_a_row_that_no_lane_can_take_is_its_own_failure(alone):
    hopeless = Prompt("too-long", "", "", "", PROMPTS[0].prefix_ids, (3,) * 40)
    finished = drain(lanes(2, 4), [*PROMPTS, hopeless])
    assert finished.pop("too-long").finish is FinishReason.ERROR
    assert texts(finished) == alone


def test_a_dead_lane_is_a_dead_engine(monkeypatch):
    engine = lanes(2, 4)
    engine.submit(PROMPTS)
    monkeypatch.setattr(engine._lanes[1], "_decode", lambda: (_ for _ in ()).throw(EngineError("no more")))
    with pytest.raises(EngineError, match="no more"):
        engine.step()


def test_engine_threads_of_the_embedded_model_are_lanes():
    built = build_engine(EngineConfig(kind="beam", threads=2, dtype="float32", device="cpu"), DECODE)
    assert isinstance(built, Lanes)
    assert built.encode(["a dog"]) == built._lanes[1].encode(["a dog"])
