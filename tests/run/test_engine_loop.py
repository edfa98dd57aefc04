"""The engine's loop serves several units at once, and every caller gets its generations or an error: none waits for ever."""

import threading
import time

import pytest

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.core.types import Prompt
from capsfusion_ray.engines.echo import EchoEngine
from capsfusion_ray.errors import ConfigError, EngineError
from capsfusion_ray.run.engine_loop import EngineLoop

PATIENCE_S = 300


def prompts(name, count=3):
    return [Prompt(f"{name}:{i}", "", f"raw {name}", f"synthetic {i}", (1,), (2,)) for i in range(count)]


def echo():
    return EchoEngine(EngineConfig(kind="echo"), DecodeConfig())


def started(engine, stall_s=PATIENCE_S, on_failure=lambda failure: None):
    loop = EngineLoop(engine, stall_s, on_failure=on_failure)
    loop.start()
    return loop


def in_threads(loop, names):
    """What `generate` returned or raised for each name, called from a thread each."""
    results = {}

    def call(name):
        try:
            results[name] = loop.generate(prompts(name))[0]
        except Exception as error:
            results[name] = error

    threads = [threading.Thread(target=call, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    return threads, results


def joined(threads):
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "a caller waits for ever"


def test_each_caller_gets_the_generations_of_its_own_prompts():
    loop = started(echo())
    threads, results = in_threads(loop, "abcd")
    joined(threads)
    for name in "abcd":
        assert set(results[name]) == {prompt.id for prompt in prompts(name)}
    loop.stop(EngineError("the test is over"))


class Slow(EchoEngine):
    def step(self):
        time.sleep(0.3)
        return []


def test_stop_ends_callers_that_wait_and_refuses_later_ones():
    loop = started(Slow(EngineConfig(kind="echo"), DecodeConfig()))
    threads, results = in_threads(loop, "ab")
    time.sleep(0.1)
    loop.stop(EngineError("the run ends"))
    joined(threads)
    assert {str(error) for error in results.values()} == {"the run ends"}
    with pytest.raises(EngineError, match="the run ends"):
        loop.generate(prompts("c"))
    assert not loop._thread.is_alive()


class Raises(EchoEngine):
    error: Exception

    def step(self):
        raise self.error


@pytest.mark.parametrize(
    ("error", "raised", "failures"),
    [
        (RuntimeError("CUDA error"), EngineError, ["dead"]),
        (EngineError("no memory"), EngineError, ["dead"]),
        (ConfigError("a refused key"), ConfigError, []),
    ],
)
def test_an_engine_that_raises_fails_every_caller_and_only_a_dead_one_is_reported(error, raised, failures):
    engine, reported = Raises(EngineConfig(kind="echo"), DecodeConfig()), []
    engine.error = error
    loop = started(engine, on_failure=reported.append)
    threads, results = in_threads(loop, "ab")
    joined(threads)
    assert {type(found) for found in results.values()} == {raised}
    assert all(str(error) in str(found) for found in results.values())
    assert reported == failures


class Hangs(EchoEngine):
    def step(self):
        threading.Event().wait()


def test_a_step_that_hangs_is_reported_as_stalled_and_its_callers_end():
    reported = []
    loop = started(Hangs(EngineConfig(kind="echo"), DecodeConfig()), stall_s=0.3, on_failure=reported.append)
    threads, results = in_threads(loop, "ab")
    joined(threads)
    assert reported == ["stalled"]
    assert all("engine.stall_s=0.3" in str(found) for found in results.values())
