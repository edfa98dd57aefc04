"""For what machine `plan` quotes: for the one that is asked for; left open, for the one that a run here would take."""

import logging

import pytest

from capsfusion_ray import cluster
from capsfusion_ray.config import PlanConfig, load
from capsfusion_ray.estimate import expected_pool


def pool(monkeypatch, *words, gpus_here=0, ray_address=""):
    monkeypatch.setattr(cluster, "this_machine", lambda: cluster.Resources(17, gpus_here, here=True))
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    return expected_pool(load(PlanConfig, ["input.path=in", "output.path=out", *words]))


def test_a_box_with_gpus_is_quoted_with_them(monkeypatch):
    assert pool(monkeypatch, gpus_here=8) == (1, 8)
    assert pool(monkeypatch, "cluster.max_actors=4", gpus_here=8) == (1, 4)
    assert pool(monkeypatch, "engine.kind=vllm", "engine.vllm.tensor_parallel=4", gpus_here=8) == (4, 2)


@pytest.mark.parametrize("words", [("engine.device=cpu",), ("engine.kind=echo",), ("cluster.gpus_per_actor=0",)])
def test_who_wants_no_gpu_is_quoted_none(monkeypatch, words):
    assert pool(monkeypatch, *words, gpus_here=8) == (0, 1)


def test_what_is_asked_for_is_quoted_wherever_the_plan_is_made(monkeypatch):
    assert pool(monkeypatch, "cluster.gpus_per_actor=1", "cluster.max_actors=16") == (1, 16)
    assert pool(monkeypatch, "engine.device=cuda") == (1, 1)
    assert pool(monkeypatch) == (0, 1)


def test_a_named_cluster_is_not_asked_and_the_quote_says_so(monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        assert pool(monkeypatch, gpus_here=8, ray_address="head:6379") == (0, 1)
    assert "RAY_ADDRESS=head:6379: what GPUs it has is not asked" in caplog.text
