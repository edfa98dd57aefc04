"""Labelling refuses early what cannot work, and counts what all its runs spent. The teacher itself: tests/engines/test_api.py."""

import dataclasses
import shutil

import pyarrow as pa
import pytest

from capsfusion_ray.cli import run_job
from capsfusion_ray.config import FuseConfig, GatesConfig, as_dict, parse_config, to_yaml
from capsfusion_ray.core.accounting import UnitSummary
from capsfusion_ray.core.plan import Plan
from capsfusion_ray.core.prompt import Template
from capsfusion_ray.core.types import FinishReason, Generation, WorkUnit
from capsfusion_ray.core.unit_batch import UnitBatch
from capsfusion_ray.core.unit_steps import admit, judge_unit, with_generations
from capsfusion_ray.dataset.plan_files import write_plan
from capsfusion_ray.dataset.unit_files import commit
from capsfusion_ray.errors import CostCapReached
from capsfusion_ray.run.stages import within_cap
from capsfusion_ray.storage import Store
from capsfusion_ray.training.label import LabelConfig, dollars_spent, prepare

PRICES = ["engine.api.prompt_price=10", "engine.api.output_price=100"]


@pytest.fixture
def argv(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPSFUSION_API_KEY", "sk-secret")
    return [
        f"output.path={tmp_path / 'out'}",
        "input.path=in",
        "engine.api.url=http://127.0.0.1:9/v1",
        "engine.api.model=m",
    ]


def commit_units(root, units):
    """`units` of ten rows: 1,000 prompt and 100 output tokens each, 0.02 dollars at PRICES."""
    store = Store(root)
    work = [WorkUnit(f"id{i}", "a.parquet", 10 * i, 10 * i + 10, "g00000") for i in range(units + 1)]  # one is not done
    assert write_plan(store, Plan(1, {}, 10, (), tuple(work), ()))
    for unit in work[:-1]:
        rows = [
            {
                "image_url": None,
                "laion_2b": f"Lighthouse {i}",
                "laion_coco": "A white lighthouse.",
                "row_id": f"a.parquet:{i}",
                "_invalid": None,
            }
            for i in range(unit.start, unit.stop)
        ]
        table = admit(pa.Table.from_pylist(rows), GatesConfig())
        written = {i: Generation(f"{unit.id}:{i}", "A white lighthouse.", FinishReason.EOS, 100, 10) for i in range(10)}
        part, summary = judge_unit(UnitBatch(unit, with_generations(table, written)), (), GatesConfig())
        commit(store, part, summary)
    return store


def test_the_defaults_are_a_teachers(argv):
    cfg = parse_config(LabelConfig, argv)
    assert (cfg.engine.kind, cfg.decode.num_beams, cfg.cluster.gpus_per_actor) == ("api", 1, 0)
    assert cfg.gates.boilerplate == "reject", "no kept source among the labels"
    assert cfg.gates.unsupported_name.action == "reject"
    Template.parse(cfg.engine.api.prompt)
    assert prepare(cfg) == cfg


def test_the_saved_config_is_one_of_the_fuse_job(argv, tmp_path):
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(parse_config(LabelConfig, argv)))
    assert dataclasses.asdict(parse_config(FuseConfig, [str(saved)])) == dataclasses.asdict(
        parse_config(LabelConfig, argv)
    )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["engine.api.url="], "engine.api.url"),
        (["engine.api.model="], "engine.api.model"),
        (["engine.api.key_env=NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE"),
        (["engine.api.max_dollars=3"], "engine.api.prompt_price"),
        (["engine.api.max_dollars=3", *PRICES, "cluster.max_actors=null"], "cluster.max_actors"),
        (["engine.kind=echo"], "capsfusion fuse"),
        (["decode.num_beams=3"], "decode.num_beams"),
        (["output.path="], "output.path"),
    ],
)
def test_a_mistake_is_refused_before_anything_starts(argv, more, says, capsys, tmp_path):
    assert run_job(LabelConfig, prepare, [*argv, *more]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_cap_holds_for_all_runs_together_and_is_shared_among_the_actors(argv, tmp_path):
    store = commit_units(str(tmp_path / "out"), 3)
    cfg = parse_config(LabelConfig, [*argv, *PRICES, "engine.api.max_dollars=1", "cluster.max_actors=2"])
    assert dollars_spent(store, cfg.engine.api) == pytest.approx(0.06)
    assert prepare(cfg).engine.api.max_dollars == pytest.approx(0.47)


def test_what_a_retry_paid_and_did_not_merge_counts_too(argv, tmp_path):
    root = tmp_path / "out"
    store = commit_units(str(root), 3)
    shutil.copytree(root / "_units", root / "_retry" / "e002" / "_units")
    assert dollars_spent(store, parse_config(LabelConfig, [*argv, *PRICES]).engine.api) == pytest.approx(0.12)


def test_actors_that_are_started_anew_do_not_spend_the_cap_again(argv):
    """Each counts from its own start; the driver counts what all of them committed."""
    api = parse_config(LabelConfig, [*argv, *PRICES, "engine.api.max_dollars=0.05"]).engine.api
    units = [
        UnitSummary(f"u{i}", "a", 0, 10, prompt_tokens=1000, output_tokens=100) for i in range(9)
    ]  # 0.02 dollars each
    with pytest.raises(CostCapReached, match=r"max_dollars=0.05: the units of this run cost 0.1000 dollars"):
        list(within_cap(units, api, actors=2))
    assert len(list(within_cap(units, dataclasses.replace(api, max_dollars=None), actors=2))) == 9
    assert len(list(within_cap(units[:5], api, actors=2))) == 5, "the last one may reach it"


def test_a_cap_that_is_used_up_stops_with_exit_code_1_and_says_how_to_go_on(argv, tmp_path, capsys):
    commit_units(str(tmp_path / "out"), 3)
    assert run_job(LabelConfig, prepare, [*argv, *PRICES, "engine.api.max_dollars=0.05"]) == 1
    assert "higher limit" in capsys.readouterr().err


def test_a_teacher_is_judged_as_strictly_as_the_fragment_says():
    strict = as_dict(parse_config(FuseConfig, ["conf/gates/strict.yaml"], complete=False).gates)
    assert as_dict(parse_config(LabelConfig, [], complete=False).gates) == strict | {"boilerplate": "reject"}
