"""The vllm engine: tested with a stub of vLLM everywhere, and with vLLM itself where it is installed and there is a GPU."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import drain, random_prompts, texts, tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from capsfusion_ray.config import DecodeConfig, EngineConfig, VllmConfig
from capsfusion_ray.core.types import FinishReason
from capsfusion_ray.engines.base import Occupancy, build_engine
from capsfusion_ray.errors import ConfigError, EngineError
from capsfusion_ray.models.inspect import ModelInfo, resolve_with_model

STAND_IN = Path(__file__).resolve().parents[1] / "support" / "stub_vllm"
GREEDY = DecodeConfig(num_beams=1, max_new_tokens=12, scoring="transformers", length_penalty=1.0, no_repeat_ngram=0)


@pytest.fixture
def folder(tmp_path):
    """A model whose vocabulary is the words w0 … w59, and its tokenizer."""
    tiny_llama(3, eos_weight=2.0, dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(60)}, unk_token="w3"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", unk_token="w3").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def stand_in(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(STAND_IN))
    import vllm

    assert vllm.__version__.endswith("stub")
    yield vllm
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


def config(folder, kind="vllm", **more):
    return EngineConfig(kind=kind, model=str(folder), device="cpu", dtype="float32", max_prompt_tokens=40, **more)


@pytest.fixture
def prompts():
    import random

    return random_prompts(random.Random(5), 24)


def test_greedy_captions_are_those_of_greedy_transformers(folder, prompts, stand_in):
    ours = drain(build_engine(config(folder, slots=5), GREEDY), prompts)
    theirs = drain(build_engine(config(folder, kind="transformers"), GREEDY), prompts)
    assert texts(ours) == texts(theirs)
    told = {g.id: (g.finish, g.prompt_tokens, g.output_tokens) for g in ours.values()}
    assert told == {g.id: (g.finish, g.prompt_tokens, g.output_tokens) for g in theirs.values()}
    assert {g.finish for g in ours.values()} == {FinishReason.EOS, FinishReason.LENGTH}, "both ends were seen"


def test_it_is_fed_while_it_runs_and_never_drains_between_units(folder, prompts, stand_in):
    stand_in.LLMEngine.running_per_step = []
    engine = build_engine(config(folder, slots=5), GREEDY)
    assert engine.occupancy == Occupancy(0, 5)
    engine.submit(prompts[:6])
    assert engine.occupancy == Occupancy(5, 5)
    finished, waiting, full = [], prompts[6:], 0
    while engine.unfinished or waiting:
        while waiting and engine.unfinished < 6:
            engine.submit([waiting.pop(0)])
        full += engine.unfinished >= 5
        finished += engine.step()
    assert sorted(g.id for g in finished) == sorted(p.id for p in prompts)
    running = stand_in.LLMEngine.running_per_step
    assert full > 12, "the prompts do not fit into one batch"
    assert running[:full] == [5] * full, "no step had a free slot while five prompts were unfinished"
    assert max(running) == 5
    alone = drain(build_engine(config(folder, slots=1), GREEDY), prompts)
    assert texts({g.id: g for g in finished}) == texts(alone)


def test_a_row_that_vllm_gives_up_or_that_is_too_long_is_that_rows_error(folder, prompts, stand_in):
    engine = build_engine(config(folder, vllm=VllmConfig(sampling={"repetition": True})), GREEDY)
    assert {g.error.partition(": ")[2] for g in drain(engine, prompts).values() if g.finish is FinishReason.ERROR} == {
        "vLLM ended the caption with finish_reason=repetition"
    }
    long = [type(prompts[0])("long", "", "", "", tuple(range(3, 53)), (4,))]
    (failed,) = drain(build_engine(config(folder), GREEDY), long).values()
    assert (failed.finish, failed.error) == (
        FinishReason.ERROR,
        "long: the prompt has 51 tokens; it must have 1 to engine.max_prompt_tokens=40",
    )


def test_what_is_asked_for_reaches_vllm(folder, stand_in):
    asked = VllmConfig(
        tensor_parallel=2, temperature=0.7, sampling={"top_p": 0.9}, options={"gpu_memory_utilization": 0.5}
    )
    engine = build_engine(config(folder, vllm=asked), GREEDY)
    args, params = engine._engine.args, engine._params
    assert (args.tensor_parallel_size, args.distributed_executor_backend, args.gpu_memory_utilization) == (2, "mp", 0.5)
    assert (args.model, args.max_model_len, args.max_num_seqs) == (str(folder), 40 + 12, 256)
    assert (params.temperature, params.top_p, params.max_tokens) == (0.7, 0.9, 12)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (VllmConfig(sampling={"top_q": 1}), "top_q"),
        (VllmConfig(sampling={"top_p": 2}), "top_p must be"),
        (VllmConfig(options={"gpu_memory": 1}), "gpu_memory"),
        (VllmConfig(options={"quantization": "unheard-of"}), "Unknown quantization"),
    ],
)
def test_settings_that_vllm_does_not_take_are_config_errors(folder, stand_in, wrong, said):
    with pytest.raises(ConfigError, match=said):
        build_engine(config(folder, vllm=wrong), GREEDY)


def test_a_dead_vllm_ends_the_process_and_not_the_row(folder, prompts, stand_in, monkeypatch):
    with pytest.raises(EngineError, match="did not start"):
        build_engine(config(folder, vllm=VllmConfig(options={"gpu_memory_utilization": 2.0})), GREEDY)
    engine = build_engine(config(folder), GREEDY)
    monkeypatch.setattr(stand_in.LLMEngine, "dies_at", 2)
    with pytest.raises(EngineError, match="EngineCore"):
        drain(engine, prompts)


def test_fields_that_have_a_key_of_ours_are_refused():
    with pytest.raises(ConfigError, match=r"engine\.vllm\.sampling.*temperature"):
        VllmConfig(sampling={"temperature": 1})
    with pytest.raises(ConfigError, match=r"engine\.vllm\.options.*tensor_parallel_size"):
        VllmConfig(options={"tensor_parallel_size": 2})


@pytest.mark.parametrize("decode", [DecodeConfig(), DecodeConfig(num_beams=1, no_repeat_ngram=5)])
def test_beams_are_refused_in_words_instead_of_being_something_else(decode, folder):
    with pytest.raises(ConfigError, match=r"engine\.kind=vllm decodes greedily or by sampling.*engine\.kind=beam"):
        resolve_with_model(config(folder), decode, ModelInfo("{raw}{synthetic}", "0", False, None, {}))


def test_without_vllm_the_error_says_how_to_get_an_environment_with_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # `import vllm` fails, whether it is installed or not
    with pytest.raises(ConfigError, match=r"not installed.*RUNTIME_ENV=deploy/runtime_env_vllm\.yaml"):
        build_engine(config(folder), GREEDY)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("vllm") is None, reason="no CUDA device with vllm beside it"
)
def test_vllm_itself_writes_what_greedy_transformers_writes(folder, prompts):
    """In float32 a random model has near ties that may be broken either way, so a tenth of the captions may differ."""
    ours = drain(
        build_engine(
            EngineConfig(kind="vllm", model=str(folder), dtype="float32", max_prompt_tokens=40, slots=5), GREEDY
        ),
        prompts,
    )
    theirs = texts(drain(build_engine(config(folder, kind="transformers"), GREEDY), prompts))
    assert sum(texts(ours)[name] == theirs[name] for name in theirs) >= 0.9 * len(prompts)
