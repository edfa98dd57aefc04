"""A calibration reports the speed of a full engine, not of one that is filling or emptying."""

import time

import pytest

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.core.types import FinishReason, Generation, Prompt
from capsfusion_ray.engines.base import Occupancy
from capsfusion_ray.engines.echo import EchoEngine
from capsfusion_ray.errors import EngineError
from capsfusion_ray.run.calibrate import FILLS, steady

STEP_S, LOADING_S = 0.1, 50.0


class Clocked:
    """An engine of `room` slots, known from the first step on; a caption takes `steps` steps, and the first step is slow."""

    def __init__(self, room, steps, fails=False):
        self.now, self.submitted = 0.0, 0
        self._room, self._steps, self._fails = room, steps, fails
        self._queue, self._slots, self._began, self._given = [], [], False, 0

    def submit(self, prompts):
        self.submitted += len(prompts)
        self._queue += [prompt.id for prompt in prompts]

    @property
    def unfinished(self):
        return len(self._queue) + len(self._slots)

    @property
    def occupancy(self):
        return Occupancy(len(self._slots), self._room if self._began else 0)

    def step(self):
        self.now += STEP_S if self._began else LOADING_S
        self._began = True
        while self._queue and len(self._slots) < self._room:
            # The first captions end one after the other, so that the rows have mixed lengths, as after many refills.
            self._slots.append(
                [self._queue.pop(0), self._steps if self._given >= self._room else self._given % self._steps + 1]
            )
            self._given += 1
        for slot in self._slots:
            slot[1] -= 1
        done = [name for name, left in self._slots if left <= 0]
        self._slots = [slot for slot in self._slots if slot[1] > 0]
        finish = FinishReason.ERROR if self._fails else FinishReason.EOS
        return [Generation(name, "", finish, 150, 40, error="NaN" if self._fails else "") for name in done]


def prompts(n):
    return [Prompt(f"row-{i}", "", "", "", (1,), (2, 3)) for i in range(n)]


def measure(engine, n):
    return steady(engine, prompts(n), "cpu", lambda: engine.now)


@pytest.mark.parametrize(("room", "steps", "rows"), [(10, 10, 400), (10, 10, 3), (1, 4, 30)])
def test_the_speed_is_that_of_a_full_engine(room, steps, rows):
    engine = Clocked(room, steps)
    measured = measure(engine, rows)
    assert measured.captions == engine.submitted == max(rows, FILLS * room)
    assert (measured.prompt_tokens, measured.output_tokens) == (150, 40)
    full = room / (steps * STEP_S)
    assert 0.9 * full <= measured.captions_per_s <= 1.1 * full, "neither the slow first step nor the end counts"


def test_an_engine_that_writes_everything_in_one_step_has_a_speed():
    measured = steady(EchoEngine(EngineConfig(kind="echo"), DecodeConfig()), prompts(5), "cpu", time.monotonic)
    assert measured.captions == 5
    assert measured.captions_per_s > 0


def test_a_model_that_writes_nothing_is_an_error_with_the_reason():
    with pytest.raises(EngineError, match="none of 8 prompts became a caption: NaN"):
        measure(Clocked(2, 3, fails=True), 8)
