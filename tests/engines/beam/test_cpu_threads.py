"""One beam engine per CPU thread: the captions are those of a single engine, whatever the number of threads."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import beam_engine, drain, loaded, random_prompts, texts, tiny_llama

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.core.types import FinishReason, Prompt
from capsfusion_ray.engines.base import build_engine
from capsfusion_ray.engines.beam.cpu_threads import EnginePerThread, engine_per_thread
from capsfusion_ray.engines.beam.engine import BeamEngine
from capsfusion_ray.errors import EngineError

DECODE = DecodeConfig(num_beams=3, max_new_tokens=12)
MODEL = tiny_llama(11)
PROMPTS = random_prompts(random.Random(4), 14)


@pytest.fixture(autouse=True)
def _restore_torch_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone():
    return texts(drain(beam_engine(MODEL, DECODE, slots=1), PROMPTS))


def build(threads, slots, model=MODEL):
    torch.set_num_threads(threads)
    return engine_per_thread(loaded(model), EngineConfig(slots=slots, max_prompt_tokens=32), DECODE)


@pytest.mark.parametrize(
    ("threads", "slots", "each"), [(2, 6, [3, 3]), (3, 7, [3, 3, 3]), (4, 2, [1, 1]), (2, None, [96, 96])]
)
def test_several_engines_write_what_one_engine_writes(alone, threads, slots, each):
    engine = build(threads, slots)
    assert isinstance(engine, EnginePerThread)
    assert torch.get_num_threads() == 1, "one for each engine"
    assert texts(drain(engine, PROMPTS)) == alone
    assert engine.occupancy.capacity == sum(each)
    assert engine.occupancy.busy == 0


def test_one_thread_or_one_slot_is_one_engine(alone):
    for engine in (build(1, 6), build(4, 1)):
        assert isinstance(engine, BeamEngine)
        assert texts(drain(engine, PROMPTS)) == alone


def test_prompts_submitted_while_others_are_decoded_go_to_all_engines_and_are_counted(alone):
    engine, finished, waiting = build(2, 4), {}, list(PROMPTS)
    while engine.unfinished or waiting:
        engine.submit(waiting[:3])
        del waiting[:3]
        finished |= {generation.id: generation for generation in engine.step()}
        assert engine.unfinished + len(finished) + len(waiting) == len(PROMPTS)
        if waiting:
            assert all(one.unfinished for one in engine._engines)
    assert texts(finished) == alone


def test_a_prompt_that_no_engine_can_take_fails_alone(alone):
    too_long = Prompt("too-long", "", "", "", PROMPTS[0].prefix_ids, (3,) * 40)
    finished = drain(build(2, 4), [*PROMPTS, too_long])
    assert finished.pop("too-long").finish is FinishReason.ERROR
    assert texts(finished) == alone


def test_one_dead_engine_makes_the_step_fail(monkeypatch):
    engine = build(2, 4)
    engine.submit(PROMPTS)
    monkeypatch.setattr(engine._engines[1], "_decode", lambda: (_ for _ in ()).throw(EngineError("no more")))
    with pytest.raises(EngineError, match="no more"):
        engine.step()


def test_engine_threads_of_the_embedded_model_are_engines():
    built = build_engine(EngineConfig(kind="beam", threads=2, dtype="float32", device="cpu"), DECODE)
    assert isinstance(built, EnginePerThread)
    assert built.encode(["a dog"]) == built._engines[1].encode(["a dog"])
