"""A config is parsed once; every mistake is refused with the way out before anything starts."""

import dataclasses
from pathlib import Path

import pytest

from capsfusion_ray.cli import EXIT_DONE, run_job
from capsfusion_ray.config import (
    FuseConfig,
    PlanConfig,
    VerifyConfig,
    as_dict,
    fingerprint,
    parse_config,
    read_saved,
    to_yaml,
    usage,
    without_secrets,
)
from capsfusion_ray.config.keys import keys_of
from capsfusion_ray.dataset.export import ExportConfig
from capsfusion_ray.dataset.takedown_criteria import TakedownConfig
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.pairing.config import PairConfig
from capsfusion_ray.reports.job import ReportConfig
from capsfusion_ray.reports.terminal import ShowConfig
from capsfusion_ray.training.average import AverageConfig
from capsfusion_ray.training.config import TrainConfig
from capsfusion_ray.training.evaluate import EvaluateConfig
from capsfusion_ray.training.label import LabelConfig

SCHEMAS = [FuseConfig, PlanConfig, VerifyConfig, LabelConfig, PairConfig, ExportConfig, TakedownConfig, ReportConfig]
SCHEMAS += [ShowConfig, TrainConfig, AverageConfig, EvaluateConfig]
CONF = Path(__file__).resolve().parents[2] / "conf"


def refused(*argv):
    with pytest.raises(ConfigError) as caught:
        parse_config(FuseConfig, argv)
    return str(caught.value)


def test_later_arguments_win_over_earlier_ones(tmp_path):
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text("decode: {num_beams: 1, max_new_tokens: 10}\nengine: {kind: echo}\n")
    b.write_text("decode: {num_beams: 2}\n")
    cfg = parse_config(FuseConfig, [str(a), str(b), "decode.max_new_tokens=20"], complete=False)
    assert (cfg.decode.num_beams, cfg.decode.max_new_tokens, cfg.engine.kind) == (2, 20, "echo")


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("engine.knd=echo", "engine.kind"),
        ("decode.num_beam=3", "decode.num_beams"),
        ("kind=echo", "engine.kind"),
        ("engine=echo", "engine.kind"),
        ("engine.kind=ech", "echo"),
        ("decode.num_beams=many", "int"),
        ("decode.num_beams=9", "1 to 8"),
        ("unit.rows=0", "positive"),
        ("output.target_file_mb=-1", "above 0"),
        ("input.path={a: 1}", "a path or a list"),
        ("--verbose", "key=value"),
        ("input.path=[a.json,b[0-9]*]", "in quotes"),
        ("nowhere.yaml", "no such file"),
        ("cluster.max_actors=0", "cluster.min_actors"),
    ],
)
def test_a_mistake_is_refused_with_the_way_out(argument, says):
    assert says in refused(argument)


def test_an_override_wins_over_a_file_that_comes_after_it(tmp_path):
    """As in `make … ARGS="… input.path=…" behind a preset that names one."""
    (tmp_path / "mine.yaml").write_text("input: {path: mine}\nunit: {rows: 7}\n")
    cfg = parse_config(FuseConfig, ["output.path=o", "input.path=given", str(tmp_path / "mine.yaml")])
    assert (cfg.input.path, cfg.unit.rows) == ("given", 7)


def test_help_names_every_key_with_its_default(capsys):
    assert run_job(FuseConfig, pytest.fail, ["conf/demo.yaml", "--help"]) == EXIT_DONE
    said = capsys.readouterr().out
    assert "decode.num_beams=3  (int)" in said
    assert "engine.kind=beam  (one of beam, transformers" in said


def test_a_text_value_is_taken_literally():
    cfg = parse_config(FuseConfig, ["source.columns.raw=null", "output.path=s3://b/[x]{y}"], complete=False)
    assert cfg.source.columns.raw == "null"
    assert cfg.output.path == "s3://b/[x]{y}"


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_config(FuseConfig, [], complete=False).engine.kind = "echo"


def test_saved_config_loads_again_and_hides_secrets(tmp_path):
    cfg = parse_config(
        FuseConfig,
        ["output.path=o", "input.path=[a,b]", "output.storage.secret=hunter2", "output.storage.endpoint_url=http://x"],
    )
    saved = tmp_path / "c.yaml"
    saved.write_text(to_yaml(cfg))
    again = parse_config(FuseConfig, [str(saved)])
    assert "hunter2" not in saved.read_text()
    assert again.output.storage == {"secret": "***", "endpoint_url": "http://x"}
    assert dataclasses.replace(again, output=cfg.output) == cfg


def test_secrets_of_every_storage_section_are_masked(tmp_path):
    cfg = parse_config(ExportConfig, ["output.path=o", "to=t", "to_storage.secret=0123", "to_storage.key=1e5"])
    assert cfg.to_storage == {"secret": "0123", "key": "1e5"}, "taken literally"
    assert without_secrets(["to_storage.secret=hunter2"]) == ["to_storage.secret=***"]
    assert "0123" not in to_yaml(cfg)


def test_a_command_line_is_shown_without_secrets():
    words = [
        "jobs/fuse.py",
        "output.path=s3://b/out",
        "output.storage.endpoint_url=http://x",
        "engine.api.key_env=KEY",
        "a.yaml",
    ]
    secret = [
        "output.storage.secret=hunter2",
        "input.storage.account_key=hunter2",
        "engine.storage={connection_string: hunter2}",
    ]
    secret += ["output={path: s3://b/out, storage: {secret: hunter2}}"]
    shown = ["output.storage.secret=***", "input.storage.account_key=***", "engine.storage=***", "output=***"]
    assert without_secrets([*words, *secret]) == [*words, *shown]
    assert without_secrets(["input.path=s3://storage/key/"]) == ["input.path=s3://storage/key/"]


@pytest.mark.parametrize("secret", ["007", "1e5", "true", "null", "a=b", "[", "x: y #z"])
def test_a_secret_is_taken_literally(secret):
    cfg = parse_config(FuseConfig, ["output.path=o", "input.path=i", f"output.storage.secret={secret}"])
    assert cfg.output.storage == {"secret": secret}


def test_fingerprint_does_not_depend_on_key_order():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) != fingerprint({"a": 1, "b": [3]})


@pytest.mark.parametrize(
    "path", [p for p in sorted(CONF.rglob("*.yaml")) if p.parent.name != "train"], ids=lambda p: p.name
)
def test_every_fragment_of_conf_loads(path):
    assert as_dict(parse_config(FuseConfig, [str(path)], complete=False))


@pytest.mark.parametrize("name", ["finetune", "reinforce"])
def test_a_key_that_a_fragment_leaves_open_must_be_given(name):
    """Without a model the job would train a tiny one from scratch, for hours, and report success."""
    fragment = str(CONF / "train" / f"{name}.yaml")
    with pytest.raises(ConfigError, match=r"it leaves model\.path to you; give model\.path=…"):
        parse_config(TrainConfig, [fragment, "optim.steps=2000"])
    given = ["model.path=out/model", "data.path=triples.json", "output.path=out"]
    assert parse_config(TrainConfig, [fragment, *given]).model.path == "out/model"


@pytest.mark.parametrize(
    ("schema", "given", "missing"),
    [
        (FuseConfig, ["output.path=o"], "input.path"),
        (PlanConfig, ["input.path=i"], "output.path"),
        (VerifyConfig, [], "output.path"),
        (LabelConfig, ["input.path=i"], "output.path"),
        (PairConfig, ["raw.path=r", "output.path=o"], "synthetic.path"),
        (PairConfig, ["raw.path=r", "synthetic.path=s"], "output.path"),
        (ExportConfig, ["output.path=o"], "to"),
        (TakedownConfig, ["urls=u"], "output.path"),
        (ReportConfig, ["beside.path=b"], "output.path"),
        (ShowConfig, [], "output.path"),
        (TrainConfig, ["output.path=o"], "data.path"),
        (TrainConfig, ["data.path=d"], "output.path"),
        (AverageConfig, ["output.path=o"], "models"),
        (EvaluateConfig, [], "data.path"),
    ],
)
def test_a_required_key_that_is_missing_is_named(schema, given, missing):
    with pytest.raises(ConfigError, match=rf"^{missing}: missing; give {missing}=… \(\w.+\)$"):
        parse_config(schema, given)
    assert parse_config(schema, given, complete=False)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_key_of_every_job_has_an_explanation(schema):
    assert [key.name for key in keys_of(schema) if not key.text and key.wants != "section"] == []


def test_help_shows_first_the_keys_that_people_set():
    people, experts = usage(FuseConfig).split("Keys for experts")
    assert people.count("\n  ") <= 25
    assert "  input.path=" in people
    assert "  engine.stall_s=900.0  (float) a decode step" in experts


def test_each_job_has_its_own_schema():
    with pytest.raises(ConfigError):
        parse_config(VerifyConfig, ["engine.kind=echo"])


@pytest.mark.parametrize("word", ["filter.max_punsafe=.nan", "unit.target_s=.inf", "cluster.gpus_per_actor=-.inf"])
def test_a_number_that_is_not_finite_is_refused_by_name(word, tmp_path):
    key = word.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"{key}=-?(nan|inf): not a finite number"):
        parse_config(FuseConfig, [word], complete=False)
    section, name = key.split(".")
    (tmp_path / "a.yaml").write_text(f"{section}: {{{name}: {word.partition('=')[2]}}}\n")
    with pytest.raises(ConfigError, match="not a finite number"):
        parse_config(FuseConfig, [str(tmp_path / "a.yaml")], complete=False)


def test_a_saved_config_is_read_as_text_that_names_no_secret(monkeypatch):
    """The config of a stranger's output is shown in a report of ours."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    saved = read_saved("cluster: {price_per_gpu_hour: '${oc.env:AWS_SECRET_ACCESS_KEY}'}")
    assert saved == {"cluster": {"price_per_gpu_hour": "${oc.env:AWS_SECRET_ACCESS_KEY}"}}
    for text in ("- a", "{", "a: !!python/object/apply:os.system ['true']"):
        with pytest.raises(ConfigError):
            read_saved(text)
