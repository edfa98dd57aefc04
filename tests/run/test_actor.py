"""The process of an actor really dies, and the next one finds out why. Without Ray: each life of an actor is a forked process."""

import json
import logging
import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capsfusion_ray.config import DecodeConfig, EngineConfig, GatesConfig
from capsfusion_ray.core.columns import FUSED, ROW_ID
from capsfusion_ray.core.prompt import TEMPLATE
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.core.unit_batch import Apart, UnitBatch
from capsfusion_ray.core.unit_steps import ERROR, FINISH, admit
from capsfusion_ray.engines.echo import EchoEngine
from capsfusion_ray.run import actor as actors
from capsfusion_ray.run import poison_rows
from capsfusion_ray.run.poison_rows import AttemptLog
from capsfusion_ray.run.stages import judge_and_commit
from capsfusion_ray.storage import Store

ROWS = 12


def unit_of(poison, path="shard.parquet"):
    unit = WorkUnit(f"id-{path}", path, 0, ROWS, "g00000")
    rows = [
        {
            "image_url": f"u{i}",
            "laion_2b": f"Poison {i}" if i in poison else f"Lighthouse {i}",
            "laion_coco": "A white lighthouse on a coast.",
            "row_id": f"{path}:{i}",
            "_invalid": None,
        }
        for i in range(ROWS)
    ]
    return UnitBatch(unit, admit(pa.Table.from_pylist(rows), GatesConfig()), Apart()).pack()


class PoisonEngine(EchoEngine):
    def step(self):
        if any("Poison" in prompt.raw for prompt in self._queue):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step()


class DeadEngine(EchoEngine):
    def step(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


class StalledEngine(EchoEngine):
    def step(self):
        time.sleep(600)


class FailingEngine(EchoEngine):
    """Ends its process with every step."""

    def step(self):
        os._exit(9)


PATIENCE_S = 300  # a step of these engines takes microseconds, and minutes on a starved machine


def fuse_once(engine, store, batch, result, stall_s=PATIENCE_S, notice=None):
    """Run one process of an actor; its exit code. If it fused the unit, its table is in the file `result`."""

    def live():
        logging.getLogger().handlers.clear()  # those of pytest: the actor logs to stderr
        config = EngineConfig(kind="echo", stall_s=stall_s)
        tools = actors.ActorTools(AttemptLog(store, "run"), notice=notice, build=engine)
        actor = actors.FusionActor(config, DecodeConfig(), TEMPLATE, tools)
        pq.write_table(actor(batch), result)
        if notice:
            actor(batch)  # Ray Data knows of no notice and sends the next unit

    process = multiprocessing.get_context("fork").Process(target=live)
    process.start()
    process.join(PATIENCE_S)
    return process.exitcode


@pytest.mark.parametrize("poison", [{0}, {5}, {3, 11}])
def test_the_rows_that_kill_their_worker_are_rejected_and_the_others_fused(tmp_path, poison):
    store, result = Store(str(tmp_path / "out")), tmp_path / "result"
    batch = unit_of(poison)
    deaths = 0
    while (code := fuse_once(PoisonEngine, store, batch, result)) != 0:
        assert code == -signal.SIGKILL
        deaths += 1
        assert deaths < 20
    table = UnitBatch.unpack(pq.read_table(result)).table.to_pylist()
    assert {int(row[ROW_ID].split(":")[1]) for row in table if row[FINISH] == "crash"} == poison
    assert all("died" in row[ERROR] for row in table if row[FINISH] == "crash")
    assert all(row[FUSED] for row in table if row[FINISH] != "crash")
    assert not store.list("_run/attempts"), "a fused unit leaves no note"


@pytest.mark.parametrize(("engine", "stall_s", "code"), [(DeadEngine, PATIENCE_S, 70), (StalledEngine, 1.0, 71)])
def test_a_dead_or_stalled_engine_ends_its_process_and_says_why(tmp_path, engine, stall_s, code, capfd):
    assert fuse_once(engine, Store(str(tmp_path)), unit_of(()), tmp_path / "result", stall_s) == code
    said = capfd.readouterr().err
    assert ("illegal memory access" in said and "shard.parquet:0" in said) if code == 70 else "in step" in said


def test_a_unit_that_kills_every_worker_ends_the_run_with_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(poison_rows, "MAX_DEATHS", 3)
    store, batch, result = Store(str(tmp_path)), unit_of(()), tmp_path / "result"
    codes = [fuse_once(FailingEngine, store, batch, result) for _ in range(4)]
    assert codes == [9, 9, 9, 1], "the fourth raises EngineError instead of trying"


def test_a_bug_stops_the_run_with_its_traceback_and_its_units_name(tmp_path, capfd):
    """In each of the stages that know the unit: the fusion and the commit."""
    whole = UnitBatch.unpack(unit_of(()))
    broken = UnitBatch(whole.unit, whole.table.drop_columns(["laion_2b"]))
    assert fuse_once(EchoEngine, Store(str(tmp_path)), broken.pack(), tmp_path / "result") == 1
    said = capfd.readouterr().err
    assert "KeyError" in said
    assert "This happened in unit id-shard.parquet: shard.parquet, rows 0 to 12." in said
    with pytest.raises(KeyError) as bug:
        judge_and_commit(broken, SimpleNamespace(fields=(), gates=GatesConfig(), output=Store(str(tmp_path))))
    assert bug.value.__notes__ == ["This happened in unit id-shard.parquet: shard.parquet, rows 0 to 12."]


class SlowEngine(EchoEngine):
    def step(self):
        time.sleep(0.5)
        return super().step()


class ForeverEngine(EchoEngine):
    def step(self):
        time.sleep(0.1)
        return []


class Notice:
    """Says that the node leaves in `seconds`, as soon as the store holds other notes of attempts than at the start."""

    def __init__(self, store, seconds):
        self._store, self._seconds = store, seconds
        self._before = notes(store)

    def left_s(self):
        return self._seconds if notes(self._store) not in ([], self._before) else None


def notes(store):
    return [json.loads(store.get(file.path)) for file in store.list("_run/attempts")]


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(actors, "NOTICE_EVERY_S", 0.01)
    monkeypatch.setattr(actors, "LEAVE_S", 0.3)


def test_on_a_node_that_leaves_the_unit_under_way_is_finished_and_no_other_begins(tmp_path, hasty):
    store, result = Store(str(tmp_path / "out")), tmp_path / "result"
    assert (
        fuse_once(SlowEngine, store, unit_of(()), result, notice=Notice(store, PATIENCE_S)) == actors.EXIT_NODE_LEAVES
    )
    assert all(row[FUSED] for row in UnitBatch.unpack(pq.read_table(result)).table.to_pylist())
    assert not store.list("_run/attempts")


@pytest.mark.parametrize("deaths", [0, 1, 3])
def test_a_unit_that_cannot_be_finished_there_is_given_up_and_none_of_its_rows_is_accused(tmp_path, hasty, deaths):
    """However often its workers died before. After three deaths it runs alone, and the rows that it tries must not be accused."""
    store, result = Store(str(tmp_path / "out")), tmp_path / "result"
    for _ in range(deaths):
        assert fuse_once(FailingEngine, store, unit_of(()), result) == 9
    assert fuse_once(ForeverEngine, store, unit_of(()), result, notice=Notice(store, 0.7)) == actors.EXIT_NODE_LEAVES
    assert [(note["number"], note["trying"]) for note in notes(store)] == ([(deaths, None)] if deaths else [])
    assert fuse_once(EchoEngine, store, unit_of(()), result) == 0
    assert all(row[FUSED] for row in UnitBatch.unpack(pq.read_table(result)).table.to_pylist())
