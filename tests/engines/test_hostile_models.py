"""The model folder of a stranger: it executes nothing, it reads nothing outside of itself, and none is half used.

Each payload makes a folder when it is executed. What is refused is refused in one line that names the file, before
a loader of any engine sees the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_models import DECODE, Trojan, config, llama, save
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from capsfusion_ray.cli import EXIT_USAGE, run_job
from capsfusion_ray.config import EngineConfig
from capsfusion_ray.engines.base import build_engine
from capsfusion_ray.engines.loading import load_model
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.models.cache import folder_of
from capsfusion_ray.models.folder_checks import check_folder
from capsfusion_ray.models.inspect import inspect_model
from capsfusion_ray.models.location import embedded_path
from capsfusion_ray.storage import Store
from capsfusion_ray.training.average import AverageConfig, AverageOutputConfig, average
from capsfusion_ray.training.checkpoint import load_checkpoint
from capsfusion_ray.training.config import ModelConfig, TrainConfig
from capsfusion_ray.training.model import start_model, template_text

STAND_IN = Path(__file__).resolve().parents[1] / "support" / "stub_vllm"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "model", llama())


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def change(file: Path, **said: Any) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | said))


def in_vllm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(STAND_IN))
    build_engine(config(folder, "vllm"), DECODE)


# Every way by which a folder comes to a loader.
DOORS: dict[str, Callable[[Path, pytest.MonkeyPatch], Any]] = {
    "survey": lambda folder, _: inspect_model(config(folder)),
    "beam": lambda folder, _: build_engine(config(folder, "beam"), DECODE),
    "transformers": lambda folder, _: build_engine(config(folder, "transformers"), DECODE),
    "vllm": in_vllm,
    "plan": lambda folder, _: folder_of(config(folder), weights=False),
    "copy": lambda folder, _: folder_of(EngineConfig(model=f"file://{folder}")),
    "train": lambda folder, _: start_model(TrainConfig(model=ModelConfig(path=str(folder))), [], folder),
    "average": lambda folder, _: average(
        AverageConfig([str(folder)] * 2, [], AverageOutputConfig(f"{folder}.average"))
    ),
}


def refused_at_every_door(
    folder: Path, says: str, mp: pytest.MonkeyPatch, hub: Path, doors: tuple[str, ...] = tuple(DOORS)
) -> None:
    from huggingface_hub import constants

    mp.setattr(constants, "HF_HOME", str(hub))
    for door in doors:
        with pytest.raises(ConfigError, match=says) as refusal:
            DOORS[door](folder, mp)
        assert "\n" not in str(refusal.value), door
    assert not list(hub.rglob("*.safetensors*")), "refused before it was copied"


# -------------------------------------------------------------------------------------- what leads out of the folder


@pytest.mark.parametrize(
    "out",
    ["absolute", "../elsewhere/w.safetensors", "..\\elsewhere\\w.safetensors", "sub/w.safetensors", "w.pt", "", 7],
)
def test_an_index_names_files_of_its_folder_alone(
    folder: Path, out: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "elsewhere" / "w.safetensors")
    out = str(tmp_path / "elsewhere" / "w.safetensors") if out == "absolute" else out
    change(folder / "model.safetensors.index.json", metadata={}, weight_map={"lm_head.weight": out})
    refused_at_every_door(
        folder,
        r"model\.safetensors\.index\.json: lm_head\.weight=.*no \.safetensors file of this",
        monkeypatch,
        tmp_path / "hub",
    )


def test_an_index_of_pickled_weights_names_files_of_its_folder_alone(
    folder: Path, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Trojan(mark)}, tmp_path / "outside.bin")
    change(folder / "pytorch_model.bin.index.json", metadata={}, weight_map={"lm_head.weight": "../outside.bin"})
    refused_at_every_door(
        folder, r"bin\.index\.json: lm_head\.weight='\.\./outside\.bin': no \.bin file", monkeypatch, tmp_path / "hub"
    )
    assert not mark.exists()


def test_an_index_of_another_name_is_read_too(folder: Path, tmp_path: Path) -> None:
    """config.json may name the weights, and an index of them."""
    change(folder / "config.json", transformers_weights="mine.safetensors.index.json")
    change(folder / "mine.safetensors.index.json", metadata={}, weight_map={"lm_head.weight": "/etc/passwd"})
    with pytest.raises(ConfigError, match=r"mine\.safetensors\.index\.json: lm_head\.weight='/etc/passwd'"):
        load_model(config(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "fusion.json", "sub"])
def test_a_link_out_of_the_folder_is_refused(
    folder: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "fusion.json").write_text("{}")
    if (folder / name).exists():
        (folder / name).rename(outside / name)
    (folder / name).symlink_to(outside / name if name != "sub" else outside)
    refused_at_every_door(
        folder, rf"{name}: a link out of the model's folder, to .*outside", monkeypatch, tmp_path / "hub"
    )


def test_links_within_the_folder_and_those_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--model"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    save(snapshot, llama())
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(blobs / f"sum-of-{file.name}")
        file.symlink_to(Path("../../blobs", f"sum-of-{file.name}"))
    (tmp_path / "link").symlink_to(snapshot)
    assert load_model(config(tmp_path / "link")).eos_ids
    plain = shutil.copytree(snapshot, tmp_path / "plain")
    (plain / "model.safetensors").rename(plain / "weights")
    (plain / "model.safetensors").symlink_to("weights")
    assert load_model(config(plain)).eos_ids
    (blobs / "sum-of-config.json").unlink()
    (blobs / "sum-of-config.json").symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match="a link out of the model's folder, to /etc/passwd"):
        load_model(config(snapshot))


def test_a_pipe_does_not_hold_the_run(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    os.mkfifo(folder / "generation_config.json")
    with pytest.raises(ConfigError, match=r"generation_config\.json: neither a file nor a folder"):
        inspect_model(config(folder))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("vocab_file", "/etc/passwd"),
        ("tokenizer_file", "../outside/tokenizer.json"),
        ("fast_tokenizer_files", ["../outside/tokenizer.4.0.json"]),
        ("sp_model_kwargs", {"model_file": "/etc/passwd"}),
        ("init_inputs", ["/etc/passwd"]),
    ],
)
def test_a_tokenizer_names_files_of_its_folder_alone(
    folder: Path, setting: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside").mkdir()
    for name in ("tokenizer.json", "tokenizer.4.0.json"):
        shutil.copy(folder / "tokenizer.json", tmp_path / "outside" / name)
    change(folder / "tokenizer_config.json", **{setting: value})
    refused_at_every_door(
        folder,
        rf"tokenizer_config\.json: .*{next(iter(value)) if isinstance(value, dict) else setting}=",
        monkeypatch,
        tmp_path / "hub",
    )


def test_a_path_that_nobody_opens_is_no_fault(folder: Path) -> None:
    """Many a published model names its author's disk there."""
    change(
        folder / "tokenizer_config.json",
        special_tokens_map_file="/home/author/special_tokens_map.json",
        tokenizer_file=None,
    )
    assert load_model(config(folder)).eos_ids


def test_vllm_is_not_led_to_another_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(folder / "config.json", speculators_config={"verifier": {"name_or_path": "another/model"}})
    refused_at_every_door(folder, r"config\.json: speculators_config=.*another/model", monkeypatch, tmp_path / "hub")


# -------------------------------------------------------------------------------------- what asks for code


@pytest.fixture
def kernels(mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the package `kernels` were here: what is fetched with it is run."""

    def fetched(*_: Any, **__: Any) -> types.ModuleType:
        mark.mkdir(exist_ok=True)
        return types.ModuleType("theirs")

    from transformers.integrations import hub_kernels

    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel_hub", fetched, raising=False)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("config.json", {"_attn_implementation": "theirs/kernel"}),
        ("config.json", {"attn_implementation": "theirs/kernel@main:attention"}),
        ("config.json", {"attn_implementation": "flash_attention_2"}),
        ("config.json", {"attn_implementation": {"": "theirs/kernel"}}),
        ("config.json", {"_attn_implementation_internal": "theirs/kernel"}),
        ("config.json", {"text_config": {"inner": [{"attn_implementation": "theirs/kernel"}]}}),
        ("config.json", {"experts_implementation": "theirs/kernel"}),
        ("config.json", {"use_kernels": True}),
        ("config.json", {"kernel_config": {"RMSNorm": "theirs/kernel:RMSNorm"}}),
        ("config.json", {"trust_remote_code": True}),
        ("generation_config.json", {"custom_generate": "theirs/generate"}),
        ("generation_config.json", {"trust_remote_code": True}),
    ],
    ids=str,
)
def test_a_folder_that_asks_for_code_is_refused_by_name(
    folder: Path,
    file: str,
    said: dict[str, Any],
    mark: Path,
    kernels: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change(folder / file, **said)
    refused_at_every_door(
        folder,
        rf"{file}: .*=.*: would run code from outside of the folder; .*engine\.trust_remote_code",
        monkeypatch,
        tmp_path / "hub",
    )
    assert not mark.exists()


def test_the_kernel_of_the_attack_would_be_fetched_and_run(folder: Path, mark: Path, kernels: None) -> None:
    change(folder / "config.json", attn_implementation="theirs/kernel")
    with pytest.raises(Exception):  # noqa: B017, PT011  # the module is no kernel: it was run before that is found out
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert mark.exists(), "or the attack is none"


@pytest.mark.parametrize(
    "said", ["AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor", "RagRetriever", "pipeline", "os.path", 7]
)
def test_a_class_that_is_no_tokenizers_is_refused(
    folder: Path, said: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(folder / "tokenizer_config.json", tokenizer_class=said)
    refused_at_every_door(
        folder,
        rf"tokenizer_config\.json: tokenizer_class={said!r}: not the class of a tokenizer",
        monkeypatch,
        tmp_path / "hub",
    )


LOADERS = ("beam", "transformers", "vllm", "train", "average")


def with_code(folder: Path, mark: Path) -> None:
    (folder / "theirs.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        f"import os\nos.mkdir({str(mark)!r})\ndef generate(*_, **__): ...\n"
    )


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_known_model_is_not_run_and_not_asked_about(
    folder: Path, file: str, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many a published model has such an `auto_map`, from before transformers knew it."""
    with_code(folder, mark)
    mapped = {
        "AutoConfig": "theirs.Config",
        "AutoModelForCausalLM": "theirs.Model",
        "AutoTokenizer": [None, "theirs.Tokenizer"],
    }
    change(folder / file, auto_map=mapped, custom_pipelines={"x": {"impl": "theirs.Pipeline", "pt": ["AutoModel"]}})
    monkeypatch.setattr("builtins.input", lambda _: "y")
    for door in LOADERS:
        with contextlib.suppress(ConfigError):
            DOORS[door](folder, monkeypatch)
    assert not mark.exists()


def test_code_of_an_unknown_model_is_not_run_and_not_asked_about(
    folder: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_code(folder, mark)
    change(
        folder / "config.json",
        model_type="theirs",
        auto_map={"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
    )
    monkeypatch.setattr("builtins.input", lambda _: "y")
    for door in ("beam", "transformers", "train", "average"):
        with pytest.raises(ConfigError, match="contains custom code") as refusal:
            DOORS[door](folder, monkeypatch)
        assert "\n" not in str(refusal.value), door
    assert not mark.exists()


def test_who_trusts_a_folder_is_not_asked_again(folder: Path) -> None:
    change(folder / "config.json", attn_implementation="eager", use_kernels=True)
    check_folder(Store(str(folder)), trust_remote_code=True)
    change(folder / "tokenizer_config.json", vocab_file="/etc/passwd")
    with pytest.raises(ConfigError, match="vocab_file"):
        check_folder(Store(str(folder)), trust_remote_code=True)


# -------------------------------------------------------------------------------------- half a model


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("form", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_refused_and_never_half_used(
    folder: Path, alone: bool, form: str, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if alone:
        (folder / "model.safetensors").unlink()
        (folder / "config.json").unlink()
    change(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(tmp_path / "base"), r=4)
    if form.endswith(".bin"):
        torch.save({"lora": Trojan(mark)}, folder / form)
    else:
        save_file({"lora": torch.zeros(2)}, folder / form)
    doors = tuple(door for door in DOORS if not (alone and door == "average"))  # it asks for the config.json first
    refused_at_every_door(
        folder, r"adapter_config\.json: adapters are not supported yet.*merge", monkeypatch, tmp_path / "hub", doors
    )
    assert not mark.exists()


# -------------------------------------------------------------------------------------- files of another shape

DEEP = "[" * 5000 + "]" * 5000
SHAPES = [
    ("config.json", "[]", "must hold a JSON object, and holds a list"),
    ("config.json", '{"model_type": ', "not JSON"),
    ("config.json", '{"model_type": "llama", "rms_norm_eps": NaN}', "it holds NaN"),
    ("config.json", DEEP, "nested"),
    ("config.json", '{"a": ' * 60 + "1" + "}" * 60, "nested"),
    ("config.json", "\udcff", "not JSON"),
    ("generation_config.json", '"greedy"', "must hold a JSON object, and holds a str"),
    ("tokenizer_config.json", "7", "must hold a JSON object, and holds a int"),
    ("special_tokens_map.json", "[1]", "must hold a JSON object, and holds a list"),
    ("tokenizer.json", "[]", "must hold a JSON object, and holds a list"),
    ("tokenizer.json", "{", "not JSON"),
    ("tokenizer.json", DEEP, "nested"),
    ("model.safetensors.index.json", "[]", "must hold a JSON object, and holds a list"),
    ("model.safetensors.index.json", '{"metadata": {}}', "weight_map and metadata must be objects"),
    ("model.safetensors.index.json", '{"metadata": 3, "weight_map": {}}', "weight_map and metadata must be objects"),
]


@pytest.mark.parametrize(("name", "text", "says"), SHAPES, ids=[f"{name}-{text[:12]}" for name, text, _ in SHAPES])
def test_a_small_file_of_another_shape_is_named(
    folder: Path, name: str, text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    refused_at_every_door(folder, rf"{name}: .*{says}", monkeypatch, tmp_path / "hub")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.json", {"hidden_size": "wide"}),
        ("config.json", {"model_type": ["llama"]}),
        ("tokenizer.json", {"model": {"type": "Theirs"}}),
        ("tokenizer.json", {"added_tokens": 7}),
        ("tokenizer_config.json", {"auto_map": "theirs.Tokenizer"}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": 7}}),
    ],
    ids=str,
)
def test_a_value_that_its_loader_does_not_take_is_said_in_one_line(
    folder: Path, name: str, said: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(folder / name, **said)
    for door in ("beam", "transformers", "train", "average"):
        with pytest.raises(ConfigError, match=str(folder)) as refusal:
            DOORS[door](folder, monkeypatch)
        assert "\n" not in str(refusal.value), door


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "NaN",
        DEEP,
        '{"decode": []}',
        '{"decode": null}',
        '{"prompt_template": 7}',
        '{"prompt_template": "no places"}',
        '{"max_prompt_tokens": "many"}',
        '{"max_prompt_tokens": true}',
        '{"max_prompt_tokens": -1}',
        '{"decode": {"length_penalty": NaN}}',
        '{"decode": {"length_penalty": 1e999}}',
        '{"decode": {"length_penalty": true}}',
        '{"decode": {"no_repeat_ngram": 1.5}}',
        '{"shell": "rm"}',
    ],
)
def test_a_fusion_file_of_another_shape_is_named(folder: Path, text: str) -> None:
    (folder / "fusion.json").write_text(text)
    for door in (
        lambda: inspect_model(config(folder)),
        lambda: template_text(TrainConfig(model=ModelConfig(path=str(folder)))),
    ):
        with pytest.raises(ConfigError, match=r"fusion\.json: ") as refusal:
            door()
        assert "\n" not in str(refusal.value)


def test_a_job_ends_with_the_exit_code_of_a_usage_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_text("[]")
    assert (
        run_job(EngineConfig, lambda engine: {"content": inspect_model(engine).content}, [f"model={folder}"])
        == EXIT_USAGE
    )
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ")
    assert "config.json: must hold a JSON object" in error[-1]


# -------------------------------------------------------------------------------------- checkpoints of a training


def test_a_checkpoint_of_a_training_executes_nothing(mark: Path, tmp_path: Path) -> None:
    torch.save({"step": Trojan(mark)}, tmp_path / "checkpoint.pt")
    with pytest.raises(ConfigError, match=r"checkpoint\.pt: this checkpoint cannot be read") as refusal:
        load_checkpoint(tmp_path / "checkpoint.pt", llama(), [], None)  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)
    assert not mark.exists()


# -------------------------------------------------------------------------------------- what is well stays so


def test_folders_that_are_well_pass(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    change(
        folder / "config.json",
        _attn_implementation="sdpa",
        quantization_config=None,
        time_step_limit=[0.0, float("inf")],
    )
    for door in DOORS.values():
        door(folder, monkeypatch)
    (tmp_path / "sharded").mkdir()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "sharded")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    assert torch.equal(load_model(config(tmp_path / "sharded")).model.lm_head.weight, loaded.lm_head.weight)
    check_folder(Store(str(embedded_path())), trust_remote_code=False)
