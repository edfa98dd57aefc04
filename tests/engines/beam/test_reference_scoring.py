"""Scoring `reference` against real transformers 4.28.1: recorded on random tiny models, replayed here without it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from demo_prompts import demo_pairs, embedded, prompts_of
from tiny import IdTokenizer, beam_engine, drain, loaded, random_prompts, texts, tiny_llama

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.core.types import Prompt
from capsfusion_ray.engines.beam.engine import BeamEngine
from capsfusion_ray.engines.hf_engine import TransformersEngine
from capsfusion_ray.errors import ConfigError

RECORDED = json.loads((Path(__file__).parents[2] / "fixtures" / "transformers_4_28_1.json").read_text())


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: case["name"])
@pytest.mark.parametrize("slots", [1, 3])
def test_reference_scoring_matches_transformers_4_28_1_token_for_token(case, slots):
    model = tiny_llama(0, **case["shape"])
    model.load_state_dict(rebuilt_weights(model, case["seed"]))
    prompts = [
        Prompt(f"row-{i}", "", "", "", tuple(ids[: case["prefix"]]), tuple(ids[case["prefix"] :]))
        for i, ids in enumerate(case["prompts"])
    ]
    decode = DecodeConfig(
        num_beams=case["beams"], max_new_tokens=case["cap"], scoring="reference", length_penalty=case["penalty"]
    )
    ours = texts(drain(beam_engine(model, decode, slots, max_prompt_tokens=case["padded"]), prompts))
    assert [ours[f"row-{i}"] for i in range(len(prompts))] == [" ".join(map(str, ids)) for ids in case["outputs"]]


def test_the_demo_s_captions_match_transformers_4_28_1_token_for_token():
    """The reference's settings: 3 beams, 80 new tokens, prompts padded to 256; no option that it does not have."""
    model, engine = embedded()
    prompts = prompts_of(demo_pairs(), model, engine)
    recorded = RECORDED["demo"]
    assert [list(p.prefix_ids + p.suffix_ids) for p in prompts] == recorded["prompts"], "other prompts now: record anew"
    assert len(prompts) >= 200
    decode = DecodeConfig(num_beams=3, max_new_tokens=80, scoring="reference")
    ours = texts(drain(BeamEngine(dataclasses.replace(model, tokenizer=IdTokenizer()), engine, decode), prompts))
    wrong = [at for at, p in enumerate(prompts) if ours[p.id] != " ".join(map(str, recorded["outputs"][at]))]
    assert not wrong


def rebuilt_weights(model, seed):
    """The weights that record_4_28_1.py drew: by name and in sorted order, so that both versions get the same ones."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in sorted(model.state_dict().items()):
        if name.endswith("norm.weight"):
            weights[name] = torch.ones_like(tensor)
        else:
            weights[name] = (torch.randn(tensor.shape, generator=generator) * 0.3).to(tensor.dtype)
    return weights


def test_reference_scoring_is_not_the_transformers_scoring():
    model = tiny_llama(3, eos_weight=2.0)
    import random

    prompts = random_prompts(random.Random(0), 12)
    ours = {
        scoring: texts(
            drain(beam_engine(model, DecodeConfig(num_beams=3, max_new_tokens=30, scoring=scoring), 4), prompts)
        )
        for scoring in ("reference", "transformers")
    }
    assert ours["reference"] != ours["transformers"]


def test_the_transformers_engine_refuses_the_reference_scoring_of_beams():
    with pytest.raises(ConfigError, match=r"engine\.kind=beam"):
        TransformersEngine.from_loaded(
            loaded(tiny_llama(0)), EngineConfig(kind="transformers"), DecodeConfig(num_beams=3)
        )
