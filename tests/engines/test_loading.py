"""What is refused when a model is loaded, and that the message names the thing and the way out."""

from __future__ import annotations

import json
import re

import pytest
import sentencepiece
import torch
from tiny import EOS, IdTokenizer, beam_engine, loaded, tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.engines.beam.engine import BeamEngine
from capsfusion_ray.engines.loading import LoadedModel, load_model
from capsfusion_ray.errors import ConfigError, EngineError

DECODE = DecodeConfig(num_beams=2, max_new_tokens=4)


@pytest.fixture
def folder(tmp_path):
    """A complete model folder, float32 safetensors."""
    tiny_llama(1, dtype=torch.float32).save_pretrained(tmp_path)
    words = {f"w{i}": i for i in range(60)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", unk_token="w3").save_pretrained(tmp_path)
    return tmp_path


def config(folder, **more):
    return EngineConfig(model=str(folder), device="cpu", **more)


def test_a_folder_loads_in_the_dtype_asked(folder):
    model = load_model(config(folder, dtype="bfloat16"))
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}
    assert model.eos_ids == (EOS,)
    assert model.encode(["w5 w6"]) == [[5, 6]]


def test_weights_in_the_hubs_bin_form_load(folder):
    state = tiny_llama(1, dtype=torch.float32).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    model = load_model(config(folder)).model
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])


@pytest.mark.parametrize("said", [None, {}, {"add_bos_token": True}, {"add_bos_token": False}])
def test_a_tokenizer_model_alone_is_read_and_begins_with_bos_unless_it_says_otherwise(folder, said, tmp_path_factory):
    """As LLaMA models of 2023 are, such as CapsFusion's: sentencepiece's own file, and no tokenizer.json."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(
        "\n".join(f"a lighthouse of {year} on a rock by the sea, number {year % 97}" for year in range(1700, 2000))
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=60,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    if said is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **said}))
    [ids] = load_model(config(folder)).encode(["a lighthouse"])
    assert (ids[0] == 1) == ((said or {}).get("add_bos_token", True))
    assert len(ids) > 2


def test_nan_weights_are_named(folder):
    model = tiny_llama(1, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(EngineError, match=r"model\.norm\.weight has NaN"):
        load_model(config(folder))


def test_half_a_download_is_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(EngineError, match="download"):
        load_model(config(folder))


def test_missing_weights_are_refused_not_drawn_at_random(folder):
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    state = load_file(file)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"missing keys \(model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(config(folder))


def test_a_folder_without_a_model_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"engine\.model"):
        load_model(config(tmp_path))


def refused(model, match, decode=DECODE):
    with pytest.raises(ConfigError, match=match):
        BeamEngine(LoadedModel(model, IdTokenizer(), (EOS,), "the-model"), EngineConfig(), decode)


def test_another_architecture_is_refused_by_name():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2))
    refused(model, r"GPT2LMHeadModel.*engine\.kind=transformers")


def test_a_sliding_window_shorter_than_a_caption_is_refused():
    shape = {
        "vocab_size": 60,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = MistralForCausalLM(MistralConfig(**shape, num_key_value_heads=2, sliding_window=100))
    refused(model, r"sliding window of 100.*engine\.kind=transformers")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("repetition_penalty", 1.2),
        ("no_repeat_ngram_size", 3),
        ("encoder_no_repeat_ngram_size", 3),
        ("encoder_repetition_penalty", 1.2),
        ("begin_suppress_tokens", [5]),
        ("sequence_bias", [[[5], 1.0]]),
        ("exponential_decay_length_penalty", (4, 1.1)),
    ],
)
def test_a_generation_config_the_search_would_ignore_is_refused(key, value):
    model = tiny_llama(1)
    setattr(model.generation_config, key, value)
    refused(model, f"{key}={re.escape(repr(value))} of its generation_config.json")


def test_a_model_without_eos_is_refused(folder):
    model = tiny_llama(1, dtype=torch.float32)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"eos_token": "w1"', '"eos_token": null'))
    with pytest.raises(ConfigError, match="EOS"):
        load_model(config(folder))


def test_the_engine_takes_the_weights_over_and_holds_them_once():
    mine = loaded(tiny_llama(1))
    BeamEngine(mine, EngineConfig(), DECODE)
    assert not any("q_proj" in name or "gate_proj" in name for name, _ in mine.model.named_parameters())


def test_an_engine_without_work_does_nothing():
    engine = beam_engine(tiny_llama(1), DECODE, slots=2)
    assert engine.unfinished == 0
    assert engine.step() == []
