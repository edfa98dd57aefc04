"""The training loop: it learns, goes on after a kill as if nothing had happened, and saves a standard folder."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from capsfusion_ray.train import loop
from capsfusion_ray.train.batches import cached_by_word, copy_share
from capsfusion_ray.train.config import (
    AugmentConfig,
    ModelConfig,
    OptimConfig,
    TrainClusterConfig,
    TrainConfig,
    TrainOutputConfig,
    TripleConfig,
)
from capsfusion_ray.train.optim import Average, orthogonalise


class Killed(BaseException):
    pass


def recipe(triples_file, path, steps=12):
    return TrainConfig(
        data=TripleConfig(path=str(triples_file), validation_rows=40),
        model=ModelConfig(vocab_size=400, hidden=32, layers=2, heads=2, ffn=48, max_positions=256),
        augment=AugmentConfig(copy_only_steps=2, copy_fade_steps=4),
        optim=OptimConfig(steps=steps, warmup_steps=2, decay_steps=4, batch_triples=8),
        output=TrainOutputConfig(path=str(path), checkpoint_every=3, validate_every=3),
        cluster=TrainClusterConfig(threads=1),
    )


@pytest.fixture(scope="module")
def trained(triples_file, tmp_path_factory):
    cfg = recipe(triples_file, tmp_path_factory.mktemp("trained") / "model")
    curve = []
    return cfg, loop.fit(cfg, curve.append), curve


def test_validation_loss_falls(trained):
    _, _, curve = trained
    assert curve[-1]["validation_loss"] < curve[0]["validation_loss"]
    assert [row["step"] for row in curve] == [3, 6, 9, 12]


def test_a_killed_run_goes_on_to_the_same_weights(trained, triples_file, tmp_path):
    cfg = recipe(triples_file, tmp_path / "model")

    def die(row):
        if row["step"] == 9:  # after the validation of step 9 and before its checkpoint: 6 is the last one
            raise Killed

    with pytest.raises(Killed):
        loop.fit(cfg, die)
    folder = loop.fit(cfg, lambda row: None)
    whole = AutoModelForCausalLM.from_pretrained(trained[1])
    resumed = AutoModelForCausalLM.from_pretrained(folder)
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_saved_folder_is_standard_and_carries_its_prompt(trained):
    cfg, folder, _ = trained
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    wish = json.loads((folder / "fusion.json").read_text("utf-8"))
    assert wish["prompt_template"] == loop.template_text(cfg)
    assert wish["decode"] == {"no_repeat_ngram": cfg.output.no_repeat_ngram}
    ids = tokenizer(wish["prompt_template"].format(raw="Anna Berg 1999", synthetic="A chair."), return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=4)
    assert out.shape[1] > ids["input_ids"].shape[1]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_words_cached_one_by_one_are_the_tokens_of_the_whole_text(trained, rows):
    tokenizer = AutoTokenizer.from_pretrained(trained[1])

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    cached = cached_by_word(encode)
    for row in rows:
        for text in row.values():
            assert cached(text) == encode(text)


def test_only_the_fused_caption_has_full_weight(trained):
    cfg, folder, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = loop.build_encoder(tokenizer, loop.template_text(cfg), 0.1, by_word=True)
    from capsfusion_ray.train.triples import Triple

    ids, weights = encoder(Triple("Anna Berg", "A chair.", "A chair by Anna."))
    full = [i for i, w in zip(ids, weights, strict=True) if w == 1.0]
    assert tokenizer.decode(full, skip_special_tokens=True).strip() == "A chair by Anna."
    assert full[-1] == tokenizer.eos_token_id


def test_copy_tasks_come_first_and_fade():
    cfg = TrainConfig(augment=AugmentConfig(copy_share=0.1, copy_only_steps=10, copy_fade_steps=20))
    assert copy_share(0, cfg) == copy_share(10, cfg) == 1.0
    assert copy_share(20, cfg) == pytest.approx(0.55)
    assert copy_share(1000, cfg) == pytest.approx(0.1)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
def test_muon_update_has_singular_values_near_one(shape):
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))).float())
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_swapping_the_average_twice_changes_nothing():
    model = torch.nn.Linear(3, 3)
    average = Average(model, 0.9)
    with torch.no_grad():
        model.weight.add_(1)
    before = model.weight.clone()
    average.update(model, 100)
    average.swap(model)
    assert not torch.equal(model.weight, before)
    average.swap(model)
    assert torch.equal(model.weight, before)
