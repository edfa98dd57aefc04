"""Models that are wrong in ways a loader does not see: said at load or after their first captions, and nothing of theirs is run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from bad_models import DECODE, SLOTS, WORDS, Trojan, config, llama, save
from tiny import drain
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from capsfusion_ray.config import GatesConfig
from capsfusion_ray.core.types import Prompt, WorkUnit
from capsfusion_ray.core.unit_batch import Apart, UnitBatch
from capsfusion_ray.core.unit_steps import FINISH, admit
from capsfusion_ray.engines.base import build_engine
from capsfusion_ray.engines.loading import load_model
from capsfusion_ray.errors import ConfigError, EngineError

ENGINES = pytest.mark.parametrize("kind", ["beam", "transformers"])


def fuse_a_unit(folder: Path, kind: str, rows: int = SLOTS) -> list[dict[str, Any]]:
    """Fuse a unit as an actor does."""
    from capsfusion_ray.run.unit_fuser import (
        start_fuser,
    )  # a GPU machine need not have Ray, so run/ is not imported above

    unit = WorkUnit("u", "shard.parquet", 0, rows, "g00000")
    table = pa.Table.from_pylist(
        [
            {
                "image_url": f"u{i}",
                "laion_2b": f"Lighthouse w{i % 50 + 4}",
                "laion_coco": "A white lighthouse w7 w8",
                "row_id": f"shard.parquet:{i}",
                "_invalid": None,
            }
            for i in range(rows)
        ]
    )
    fuser, _ = start_fuser(config(folder, kind), DECODE, "w5 {raw} w6 {synthetic}")
    fused: list[dict[str, Any]] = fuser.fuse(UnitBatch(unit, admit(table, GatesConfig()), Apart())).table.to_pylist()
    return fused


# ------------------------------------------------------------------------------------------------ nothing of theirs is run


def test_weights_in_the_bin_form_execute_nothing(tmp_path: Path) -> None:
    folder, mark = save(tmp_path / "model", llama()), tmp_path / "executed"
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Trojan(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(EngineError, match="its weights cannot be read"):
        load_model(config(folder))
    assert not mark.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert mark.exists(), "or the file was harmless"


def test_safetensors_are_preferred_where_both_forms_are_there(tmp_path: Path) -> None:
    folder, mark = save(tmp_path / "model", llama()), tmp_path / "executed"
    torch.save({"lm_head.weight": Trojan(mark)}, folder / "pytorch_model.bin")
    assert torch.equal(load_model(config(folder)).model.lm_head.weight, llama().lm_head.weight)
    assert not mark.exists()


def test_code_of_a_model_runs_only_where_it_is_asked_for(tmp_path: Path) -> None:
    folder, mark = save(tmp_path / "model", llama()), tmp_path / "executed"
    said = json.loads((folder / "config.json").read_text())
    said |= {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
    }
    (folder / "config.json").write_text(json.dumps(said))
    (folder / "theirs.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    with pytest.raises(ConfigError, match="contains custom code"):
        load_model(config(folder))
    assert not mark.exists()


# ------------------------------------------------------------------------------------------------ said at load

SMALL = {
    "vocab_size": WORDS,
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@ENGINES
def test_an_architecture_that_writes_no_text_is_refused(kind: str, tmp_path: Path) -> None:
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=WORDS, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ConfigError, match="not loadable as a causal language model"):
        build_engine(config(save(tmp_path / "t5", t5), kind), DECODE)
    with pytest.raises(EngineError, match=r"missing keys \(cls\.predictions.*of another model"):
        build_engine(config(save(tmp_path / "bert", BertModel(BertConfig(**SMALL))), kind), DECODE)


@ENGINES
def test_a_tokenizer_of_a_larger_model_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"2 tokens beyond the 60 of the model \(first 'w60', id 60\)"):
        build_engine(config(save(tmp_path, llama(), words=WORDS + 2), kind), DECODE)


@ENGINES
def test_a_pad_token_without_a_row_and_no_pad_token_write_the_same(kind: str, tmp_path: Path) -> None:
    """Captions of unlike lengths, so that there is something to pad."""
    written = []
    for name, tokens in {"none": {}, "one": {"pad_token": "w2"}, "foreign": {"pad_token": "[PAD]"}}.items():
        engine = build_engine(config(save(tmp_path / name, llama(), **tokens), kind), DECODE)
        ids = engine.encode(["w5 w6 w8 w9", "w7"])
        written.append(drain(engine, [Prompt(f"r{i}", "", "", "", (), tuple(row)) for i, row in enumerate(ids)]))
    assert written[0] == written[1]
    assert {name: caption.text for name, caption in written[0].items()} == {
        name: caption.text for name, caption in written[2].items()
    }


def test_an_empty_row_of_the_vocabulary_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    load_model(config(save(tmp_path / "whole", model)))
    assert not caplog.records
    with torch.no_grad():
        model.lm_head.weight[[17, 40]] = 0.0
    load_model(config(save(tmp_path / "enlarged", model)))
    assert "2 rows of its output table are zero (ids 17 'w17', 40 'w40')" in caplog.text


# ------------------------------------------------------------------------------------------------ said after the first captions


@ENGINES
def test_a_model_whose_scores_are_nan_stops_the_run_and_names_itself(kind: str, tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)  # finite, and its products are not
    folder = save(tmp_path / "model", model)
    with pytest.raises(
        ConfigError,
        match=rf"engine\.model={folder}: each of its first {SLOTS} captions failed: .*the model gave NaN.*engine\.dtype",
    ):
        fuse_a_unit(folder, kind)


@ENGINES
def test_a_model_that_never_stops_is_said_to(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    rows = fuse_a_unit(save(tmp_path / "model", llama(eos_weight=0.0)), kind)
    assert {row[FINISH] for row in rows} == {"length"}
    assert f"none of its first {SLOTS} captions came to an end within decode.max_new_tokens=4" in caplog.text


@ENGINES
def test_a_model_that_is_well_is_said_nothing_of(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    rows = fuse_a_unit(save(tmp_path / "model", llama(eos_weight=8.0)), kind, rows=3 * SLOTS)
    assert "eos" in {row[FINISH] for row in rows[:SLOTS]}
    assert "captions came to an end" not in caplog.text
