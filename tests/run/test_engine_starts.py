"""An engine that does not start ends the run or is started again. Without Ray: each process of an actor is a fork."""

import json
import logging
import multiprocessing
import os
import socket
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsfusion_ray.config import DecodeConfig, EngineConfig, GatesConfig
from capsfusion_ray.core.prompt import TEMPLATE
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.core.unit_batch import Apart, UnitBatch
from capsfusion_ray.core.unit_steps import admit
from capsfusion_ray.dataset.layout import PROGRESS
from capsfusion_ray.engines.echo import EchoEngine
from capsfusion_ray.errors import EngineError
from capsfusion_ray.run import actor as actors
from capsfusion_ray.run.engine_starts import MAX_START_DEATHS, Start, StartLog
from capsfusion_ray.run.poison_rows import AttemptLog
from capsfusion_ray.storage import Store

PATIENCE_S = 0.3  # an actor waits a thirtieth of it between two starts
PROCESS_S = 300  # no process here takes so long


class Dies:
    """Ends its process while its model loads, as the kernel ends one without memory."""

    def __init__(self, *_):
        os._exit(9)


class Fails:
    def __init__(self, *_):
        raise RuntimeError("CUDA error: no device")


class FailsByName:
    def __init__(self, *_):
        raise EngineError("no memory for its weights")


class NoStep(EchoEngine):
    def step(self):
        raise EngineError("no C compiler")


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "out"))


@pytest.fixture
def batch():
    row = {
        "image_url": "u",
        "laion_2b": "Lighthouse 1",
        "laion_coco": "A lighthouse on a coast.",
        "row_id": "s.parquet:0",
        "_invalid": None,
    }
    return UnitBatch(
        WorkUnit("id", "s.parquet", 0, 1, "g00000"), admit(pa.Table.from_pylist([row]), GatesConfig()), Apart()
    ).pack()


def live(engine, store, batch, tmp_path, patience_s=PATIENCE_S):
    """Run one process of one actor; its exit code, and what its first unit raised."""
    raised = tmp_path / "raised"
    raised.unlink(missing_ok=True)

    def life():
        logging.getLogger().handlers.clear()  # those of pytest: the actor logs to stderr
        # This kind loads a model, so its engine writes one caption before it counts as started.
        config = EngineConfig(kind="transformers", device="cpu", start_patience_s=patience_s)
        starts = StartLog(store, "run", config.start_patience_s)
        tools = actors.ActorTools(AttemptLog(store, "run"), starts, build=engine)
        actor = actors.FusionActor(config, DecodeConfig(), TEMPLATE, tools)
        try:
            pq.write_table(actor(batch), tmp_path / "fused")
        except EngineError as error:
            raised.write_text(str(error))

    process = multiprocessing.get_context("fork").Process(target=life)
    process.start()
    process.join(PROCESS_S)
    return process.exitcode, raised.read_text() if raised.exists() else None


def notes(store):
    return [file.path for file in store.list("_run/starts") if not file.path.endswith("up.json")]


@pytest.mark.parametrize("engine", [FailsByName, NoStep])
def test_while_no_engine_is_up_the_first_unit_raises_what_is_wrong(engine, store, batch, tmp_path):
    code, raised = live(engine, store, batch, tmp_path)
    assert code == 0
    assert raised in (f"{why} (on {socket.gethostname()})" for why in ("no memory for its weights", "no C compiler"))


def test_while_no_engine_is_up_an_error_that_is_not_ours_keeps_its_traceback(store, batch, tmp_path, capfd):
    code, _ = live(Fails, store, batch, tmp_path)
    assert code == 1
    assert "CUDA error: no device" in capfd.readouterr().err


@pytest.mark.parametrize("engine", [Fails, FailsByName, NoStep])
def test_while_another_engine_is_up_a_fresh_process_tries_again(engine, store, batch, tmp_path, capfd):
    assert live(EchoEngine, store, batch, tmp_path) == (0, None)
    for _ in range(3):
        assert live(engine, store, batch, tmp_path, patience_s=60 * PATIENCE_S) == (actors.EXIT_NO_START, None)
    assert "other engines of this run are up" in capfd.readouterr().err
    assert notes(store)
    assert live(EchoEngine, store, batch, tmp_path) == (0, None), "the cause is removed"
    assert not notes(store), "an actor whose engine is up leaves no note"


def test_patience_lasts_while_the_run_advances_and_ends_after_it(store, batch, tmp_path):
    assert live(EchoEngine, store, batch, tmp_path) == (0, None)
    for done in range(3):
        store.put(PROGRESS, json.dumps({"units_done": done}).encode())
        time.sleep(PATIENCE_S)
        assert live(FailsByName, store, batch, tmp_path)[0] == actors.EXIT_NO_START
    time.sleep(PATIENCE_S)
    assert live(FailsByName, store, batch, tmp_path)[1].startswith("no memory for its weights")
    time.sleep(PATIENCE_S)
    assert live(EchoEngine, store, batch, tmp_path) == (0, None), "an engine that is repaired late starts all the same"


def test_without_patience_the_first_failed_start_ends_the_run(store, batch, tmp_path):
    assert live(EchoEngine, store, batch, tmp_path) == (0, None)
    assert live(FailsByName, store, batch, tmp_path, patience_s=0)[1].startswith("no memory for its weights")


def test_processes_that_die_while_they_start_are_counted_and_end_the_run(store, batch, tmp_path):
    for _ in range(MAX_START_DEATHS):
        assert live(Dies, store, batch, tmp_path) == (9, None)
    code, raised = live(Dies, store, batch, tmp_path)
    assert code == 0
    assert f"did not start, {MAX_START_DEATHS} times in a row, and the last time its process died" in raised


def test_a_start_that_succeeds_resets_the_count_of_deaths(store, batch, tmp_path):
    for engine, code in ((Dies, 9), (Dies, 9), (EchoEngine, 0), (Dies, 9)):
        assert live(engine, store, batch, tmp_path)[0] == code
    [note] = notes(store)
    assert json.loads(store.get(note))["number"] == 1


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1e4)), min_size=1), st.floats(0, 1e4))
def test_a_start_may_be_retried_until_the_patience_has_passed_since_the_last_advance(looks, patience_s):
    now, moved, start = 0.0, 0.0, Start("run", 1, -1, 0.0, "host")
    for done, later in looks:
        now += later
        if done != start.units_done:
            moved = now
        start = start.seen(done, now)
        assert start.may_retry(True, patience_s, now) == (now - moved < patience_s)
        assert not start.may_retry(False, patience_s, now)
