"""cf.fuse and the others: the jobs as functions, with typed results and the project's errors."""

import dataclasses
import io
import logging
import shutil
from pathlib import Path

import pytest
from echo_run import finished

import capsfusion_ray as cf
from capsfusion_ray.api import functions
from capsfusion_ray.config import FuseConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """24 rows, 12 of them rejected and one caption null. Tests do not change it."""
    folder = tmp_path_factory.mktemp("finished")
    finished(folder)
    return folder / "out"


@pytest.fixture
def parsed(monkeypatch):
    """The configs that a function gives to its job, which does not run."""
    seen = []

    def call(cfg):
        seen.append(cfg)
        raise cf.EngineError("not run")

    monkeypatch.setattr(functions.jobs, "fuse", call)
    return seen


def test_arguments_win_over_config_and_later_configs_over_earlier_ones(parsed, tmp_path):
    (tmp_path / "my.yaml").write_text("decode: {num_beams: 2, max_new_tokens: 33}\nengine: {kind: echo, slots: 7}\n")
    with pytest.raises(cf.EngineError):
        cf.fuse(
            [tmp_path / "a", "b"],
            tmp_path / "out",
            num_beams=4,
            passthrough=("WIDTH",),
            config=["conf/gates/strict.yaml", tmp_path / "my.yaml", {"engine": {"slots": 8}}, "unit.rows=9"],
        )
    (cfg,) = parsed
    assert isinstance(cfg, FuseConfig)
    assert (cfg.input.path, cfg.output.path) == ([str(tmp_path / "a"), "b"], str(tmp_path / "out"))
    assert (cfg.decode.num_beams, cfg.decode.max_new_tokens) == (4, 33)
    assert (cfg.engine.kind, cfg.engine.slots, cfg.unit.rows) == ("echo", 8, 9)
    assert cfg.source.passthrough == ["WIDTH"]
    assert cfg.gates.cut_off.action == "reject"


@pytest.mark.parametrize("config", [{"decode.num_beams": 5}, {"decode": {"num_beams": 5}}, "decode.num_beams=5"])
def test_config_takes_dotted_keys_nested_keys_and_words(parsed, config):
    with pytest.raises(cf.EngineError):
        cf.fuse("in", "out", config=config)
    assert parsed[0].decode.num_beams == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"output": "out"}, "input.path: missing; give"),
        ({"input": "in"}, "output.path: missing; give"),
        ({"input": "in", "output": "out", "engine": "eco"}, "echo"),
        ({"input": "in", "output": "out", "config": {"engine.kid": 1}}, "did you mean engine.kind"),
        ({"input": "in", "output": "out", "config": {"unit.rows": object()}}, "not a value of a configuration"),
        ({"input": "in", "output": "out", "config": "no.yaml"}, "no such file"),
    ],
)
def test_a_wrong_argument_is_a_config_error_with_the_key_and_the_way_out(arguments, words):
    with pytest.raises(cf.ConfigError, match=words):
        cf.fuse(**arguments)


def test_fuse_returns_counts_that_close_resumes_and_leaves_the_logging_as_it_was(tmp_path):
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    arguments = {"output": tmp_path / "out", "engine": "echo", "local": True, "config": "conf/demo.yaml"}
    quote = cf.plan(**arguments)
    assert not (tmp_path / "out").exists()
    first = cf.fuse(**arguments)
    assert (logging.getLogger().handlers, logging.getLogger().level) == (handlers, level)
    assert first.rows.planned == first.rows.done == quote.rows == 325
    assert sum(first.rejects.values()) == first.rows.rejected
    assert (first.resumed_units, first.units) == (0, quote.units)
    assert Path(first.report).is_file()
    again = cf.fuse(**arguments)
    assert (again.rows, again.resumed_units) == (first.rows, first.units)
    assert cf.plan(**arguments).rows == 0
    with pytest.raises(cf.PlanChanged, match="num_beams"):
        cf.fuse(num_beams=5, **arguments)


def test_verify_report_and_show_of_a_finished_output(output, tmp_path):
    shutil.copytree(output, tmp_path / "out")
    verified = cf.verify(tmp_path / "out", deep=True)
    assert verified.deep
    assert verified.rows.planned == verified.rows.done == 24
    page = cf.report(tmp_path / "out")
    assert (page.finished, page.rows) == (True, verified.rows)
    assert Path(page.path).stat().st_size == page.bytes
    shown = io.StringIO()
    cf.show(tmp_path / "out", 2, stream=shown)
    assert "Rows by outcome" in shown.getvalue()
    with pytest.raises(dataclasses.FrozenInstanceError):
        page.bytes = 0


def test_damage_is_an_accounting_error_and_a_folder_that_is_no_output_a_config_error(output, tmp_path):
    shutil.copytree(output, tmp_path / "out")
    next((tmp_path / "out/data").rglob("*.parquet")).unlink()
    with pytest.raises(cf.AccountingError, match="missing"):
        cf.verify(tmp_path / "out")
    with pytest.raises(cf.ConfigError, match=r"no manifest\.json"):
        cf.verify(tmp_path / "nothing")


def test_takedown_and_export(output, tmp_path):
    shutil.copytree(output, tmp_path / "out")
    (tmp_path / "ids.txt").write_text("a.parquet:0\nno.parquet:0\n")
    removed = cf.takedown(tmp_path / "out", row_ids=tmp_path / "ids.txt")
    assert (removed.removed, removed.not_found) == (1, 1)
    assert cf.verify(tmp_path / "out", deep=True).rows.removed == 1
    exported = cf.export(tmp_path / "out", tmp_path / "hub", title="Mine")
    assert exported.rows == cf.verify(tmp_path / "out").rows.fused
    assert "# Mine" in (tmp_path / "hub/README.md").read_text("utf-8")


def test_evaluate_measures_a_model_beside_the_baselines(tmp_path):
    (tmp_path / "triples.jsonl").write_text(
        '{"raw": "Cape Nord 1889", "synthetic": "a lighthouse", "best": "The Cape Nord lighthouse"}\n' * 3
    )
    columns = {"data.raw": "raw", "data.synthetic": "synthetic", "data.reference": "best"}
    result = cf.evaluate(tmp_path / "triples.jsonl", rows=2, config=[columns, {"engine.kind": "echo"}])
    assert (result.rows, result.system) == (2, "model")
    assert {"raw", "synthetic", "model", "reference"} <= result.figures.keys()
