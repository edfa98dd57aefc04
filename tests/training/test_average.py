"""jobs/average.py: one model out of several of one start."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from capsfusion_ray.errors import ConfigError
from capsfusion_ray.models.fusion_file import FUSION_FILE
from capsfusion_ray.models.location import embedded_path
from capsfusion_ray.training.average import AverageConfig, AverageOutputConfig, average

CONTENT = {
    "vocab_size": 4096,
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
}


def save(folder, seed, **other):
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**CONTENT, **other})).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_path()).save_pretrained(folder)
    shutil.copy(embedded_path() / FUSION_FILE, folder)
    return str(folder)


def config(models, shares=(), output="average"):
    return AverageConfig(list(models), list(shares), AverageOutputConfig(str(output)))


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.parametrize(
    ("shares", "expected"), [([], (0.5, 0.5)), ([0.7, 0.3], (0.7, 0.3)), ([1.25, -0.25], (1.25, -0.25))]
)
def test_every_weight_is_the_average_and_the_folder_a_model_that_says_its_wishes(tmp_path, shares, expected):
    a, b = save(tmp_path / "a", 1), save(tmp_path / "b", 2)
    assert average(config([a, b], shares, tmp_path / "ab"))["shares"] == dict(zip([a, b], expected, strict=True))
    for name, mixed in weights(tmp_path / "ab").items():
        wanted = expected[0] * weights(a)[name] + expected[1] * weights(b)[name]
        torch.testing.assert_close(mixed, wanted, rtol=2**-8, atol=1e-6)  # saved in bfloat16
    assert (tmp_path / "ab" / FUSION_FILE).read_text() == (tmp_path / "a" / FUSION_FILE).read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "ab").get_vocab() == AutoTokenizer.from_pretrained(a).get_vocab()


def test_what_cannot_be_averaged_is_refused_by_name(tmp_path):
    a, b, wide = save(tmp_path / "a", 1), save(tmp_path / "b", 2), save(tmp_path / "wide", 3, intermediate_size=32)
    foreign = save(tmp_path / "foreign", 4)
    tokenizer = AutoTokenizer.from_pretrained(foreign)
    tokenizer.add_tokens(["<|other|>"])
    tokenizer.save_pretrained(foreign)
    out = tmp_path / "out"
    for wrong, said in [
        (config([a], output=out), "at least two"),
        (config([a, b], [0.7], out), r"shares=\[0.7\]: give one share per model \(2\)"),
        (config([a, b], [0.7, 0.4], out), "with a sum of 1"),
        (config([a, b], output=""), "output.path=: give a folder"),
        (config([a, b], output=a), f"output.path={a}: .* none of the models"),
        (config([a, str(tmp_path / "none")], output=out), "none is no model folder"),
        (config([a, wide], output=out), f"{wide} and {a} differ in layers"),
        (config([a, foreign], output=out), "or vocabulary"),
    ]:
        with pytest.raises(ConfigError, match=said):
            average(wrong)
    assert not out.exists()
