"""The machine that `plan` quotes for: the one that the settings ask for, else the one that a run here would use."""

import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capsfusion_ray.config import PlanConfig, parse_config
from capsfusion_ray.dataset.layout import part_path
from capsfusion_ray.dataset.plan_files import write_plan
from capsfusion_ray.run.executors import ray as ray_executor
from capsfusion_ray.run.pool import Resources
from capsfusion_ray.run.quote import estimate, expected_pool
from capsfusion_ray.run.survey import next_plan
from capsfusion_ray.storage import Store


def pool(monkeypatch, *words, gpus_here=0, ray_address=""):
    monkeypatch.setattr(ray_executor, "this_machine", lambda: Resources(17, gpus_here, here=True))
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    return expected_pool(parse_config(PlanConfig, ["input.path=in", "output.path=out", *words]))


def test_a_machine_with_gpus_is_quoted_with_them(monkeypatch):
    assert pool(monkeypatch, gpus_here=8) == (1, 8)
    assert pool(monkeypatch, "cluster.max_actors=4", gpus_here=8) == (1, 4)
    assert pool(monkeypatch, "cluster.gpus_per_actor=1", gpus_here=8) == (1, 8)
    assert pool(monkeypatch, "cluster.gpus_per_actor=0.5", gpus_here=8) == (0.5, 16)
    assert pool(monkeypatch, "engine.device=cuda", gpus_here=8) == (1, 8)
    assert pool(monkeypatch, "engine.kind=vllm", "engine.vllm.tensor_parallel=4", gpus_here=8) == (4, 2)


@pytest.mark.parametrize("words", [("engine.device=cpu",), ("engine.kind=echo",), ("cluster.gpus_per_actor=0",)])
def test_settings_that_use_no_gpu_are_quoted_without(monkeypatch, words):
    assert pool(monkeypatch, *words, gpus_here=8) == (0, 16), "one actor per core, as a run would have; one core reads"


def test_what_the_settings_ask_for_is_quoted_on_any_machine(monkeypatch):
    assert pool(monkeypatch, "cluster.gpus_per_actor=1", "cluster.max_actors=16") == (1, 16)
    assert pool(monkeypatch, "engine.device=cuda") == (1, 1)
    assert pool(monkeypatch, "cluster.gpus_per_actor=1", "cluster.min_actors=2", gpus_here=1) == (1, 2)
    assert pool(monkeypatch) == (0, 16)


def test_a_named_cluster_is_not_looked_up_and_the_log_says_so(monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        assert pool(monkeypatch, gpus_here=8, ray_address="head:6379") == (0, 1)
    assert "RAY_ADDRESS=head:6379: its GPUs are not looked up" in caplog.text


def test_what_is_done_already_is_not_quoted_again_and_nothing_is_written(tmp_path, monkeypatch):
    pq.write_table(
        pa.table({"raw": [f"Cape No. {i}" for i in range(40)], "synthetic": ["a lighthouse"] * 40}),
        tmp_path / "a.parquet",
    )
    cfg = parse_config(
        PlanConfig,
        [f"input.path={tmp_path}/a.parquet", f"output.path={tmp_path}/out", "engine.kind=echo", "unit.rows=10"],
    )
    plans = []
    monkeypatch.setattr("capsfusion_ray.run.quote.next_plan", lambda *args: plans.append(next_plan(*args)) or plans[-1])
    quote = estimate(cfg)
    assert (quote["rows"], quote["units"], quote["rows_done"]) == (40, 4, 0)
    assert not (tmp_path / "out").exists()

    store = Store(cfg.output.path)
    write_plan(store, plans[0])
    for number, unit in enumerate(plans[0].units, 1):
        store.put(part_path(unit.id), b"")
        quote = estimate(cfg)
        assert (quote["rows"], quote["units"], quote["rows_done"]) == (40 - 10 * number, 4 - number, 10 * number)
    assert quote["text"] == "nothing is left to do: all 40 planned rows are done"
