"""fusion.json: which settings it may have, and their priority: the config first, then the model, then the reference."""

import json

import pytest

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.models.fusion_file import FUSION_FILE
from capsfusion_ray.models.inspect import inspect_model, resolve_with_model


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def resolved(folder, fusion, decode=None):
    (folder / FUSION_FILE).write_text(json.dumps(fusion))
    engine = EngineConfig(model=str(folder))
    return resolve_with_model(engine, decode or DecodeConfig(), inspect_model(engine))


def test_the_config_wins_over_the_model_and_the_model_over_the_reference(folder):
    fusion = {"decode": {"scoring": "transformers", "length_penalty": 1.5}, "max_prompt_tokens": 99}
    engine, decode = resolved(folder, fusion)
    assert (decode.scoring, decode.length_penalty, decode.no_repeat_ngram) == ("transformers", 1.5, 0)
    assert engine.max_prompt_tokens == 99
    _, decode = resolved(folder, fusion, DecodeConfig(scoring="reference", length_penalty=0.0, no_repeat_ngram=4))
    assert (decode.scoring, decode.length_penalty, decode.no_repeat_ngram) == ("reference", 0.0, 4)


def test_without_settings_of_the_model_the_reference_counts(folder):
    _, decode = resolved(folder, {})
    assert (decode.scoring, decode.length_penalty, decode.no_repeat_ngram) == ("reference", 1.0, 0)
    assert decode == decode.resolved()


@pytest.mark.parametrize(
    ("fusion", "named"),
    [
        ({"decode": {"scoring": "best"}}, "decode.scoring"),
        ({"decode": {"length_penalty": "high"}}, "decode.length_penalty"),
        ({"decode": {"no_repeat_ngram": -1}}, "decode.no_repeat_ngram"),
        ({"decode": {"num_beams": 5}}, "decode.num_beams"),
        ({"prompt": "{raw}"}, "prompt"),
    ],
)
def test_a_bad_setting_is_refused_by_file_and_key(folder, fusion, named):
    with pytest.raises(ConfigError, match=named) as raised:
        resolved(folder, fusion)
    assert str(folder / FUSION_FILE) in str(raised.value)
