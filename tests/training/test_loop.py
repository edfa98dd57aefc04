"""The training loop: it learns, goes on after a kill as if nothing had happened, and saves a standard folder."""

import dataclasses
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from training_runs import Killed, recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from capsfusion_ray.core.prompt import TEMPLATE, PromptBuilder
from capsfusion_ray.core.types import CaptionPair
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.training import loop
from capsfusion_ray.training.batches import cached_by_word, copy_share
from capsfusion_ray.training.config import (
    AugmentConfig,
    ModelConfig,
    OptimConfig,
    ReinforceConfig,
    TrainConfig,
    TripleConfig,
)
from capsfusion_ray.training.model import build_encoder, template_text
from capsfusion_ray.training.optim import Average, orthogonalise
from capsfusion_ray.training.triples import Triple


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
    measured = [
        json.loads(line)["step"] for line in (loop.run_folder(cfg) / loop.CURVE).read_text("utf-8").splitlines()
    ]
    assert measured == [3, 6, 9, 12], "each step once"
    whole = AutoModelForCausalLM.from_pretrained(trained[1])
    resumed = AutoModelForCausalLM.from_pretrained(folder)
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_saved_folder_is_standard_and_carries_its_prompt(trained):
    cfg, folder, _ = trained
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    wish = json.loads((folder / "fusion.json").read_text("utf-8"))
    assert wish["prompt_template"] == template_text(cfg)
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
    encoder = build_encoder(tokenizer, template_text(cfg), 0.1, ours=True)
    ids, weights = encoder(Triple("Anna Berg", "A chair.", "A chair by Anna."))
    full = [i for i, w in zip(ids, weights, strict=True) if w == 1.0]
    assert tokenizer.decode(full, skip_special_tokens=True).strip() == "A chair by Anna."
    assert full[-1] == tokenizer.eos_token_id


def with_spaces(texts):
    """A byte-level BPE whose words bring their space along, as most do, and that begins every text with BOS."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=900, special_tokens=["<s>", "</s>"], show_progress=False)
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("template", [TEMPLATE, "{raw}|{synthetic}\n"])
@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_any_tokenizer_is_trained_on_the_very_prompts_that_engines_build(rows, template, weight):
    """One that merges over the seams of the prompt."""
    tokenizer = with_spaces(
        template.format(raw=row["laion_2b"], synthetic=row["laion_coco"]) + " " + row["capsfuion_official"]
        for row in rows
    )
    encoder = build_encoder(tokenizer, template, weight, ours=False)
    builder = PromptBuilder(template, lambda texts: tokenizer(texts)["input_ids"], 256)
    for row in rows[:50]:
        triple = Triple(row["laion_2b"], row["laion_coco"], row["capsfuion_official"])
        [built] = builder.build([CaptionPair("1", triple.raw, triple.synthetic)])
        assert encoder.prompt(triple) == [*built.prefix_ids, *built.suffix_ids]
        ids, weights = encoder(triple)
        fused = [i for i, w in zip(ids, weights, strict=True) if w == 1.0]
        assert ids[: len(encoder.prompt(triple))] == encoder.prompt(triple)
        assert fused[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(fused[:-1]).strip() == triple.fused
        sources = tokenizer.decode([i for i, w in zip(ids, weights, strict=True) if 0 < w < 1])
        assert triple.raw in sources if weight else not sources


@pytest.mark.parametrize("samples", [0, 2])
def test_a_model_of_another_architecture_is_trained_on(rows, triples_file, tmp_path, samples):
    tokenizer = with_spaces(" ".join(row.values()) for row in rows)
    shape = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, eos_token_id=tokenizer.eos_token_id)
    for what in (GPT2LMHeadModel(shape), tokenizer):
        what.save_pretrained(tmp_path / "gpt2")
    cfg = recipe(triples_file, tmp_path / "model", steps=4)
    cfg = dataclasses.replace(
        cfg,
        model=ModelConfig(path=str(tmp_path / "gpt2")),
        prompt_template="{raw} and {synthetic} is",
        optim=dataclasses.replace(cfg.optim, muon_lr=0.0),
        reinforce=ReinforceConfig(samples=samples),
    )
    folder = loop.fit(cfg, lambda row: None)
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "gpt2", folder))
    assert not torch.equal(before.transformer.wte.weight, after.transformer.wte.weight.float())


def test_what_no_run_could_end_well_with_is_said_at_once():
    for make in (
        lambda: TripleConfig(validation_rows=0),
        lambda: OptimConfig(warmup_steps=-1),
        lambda: OptimConfig(batch_triples=0),
        lambda: OptimConfig(source_loss_weight=1.0),
    ):
        with pytest.raises(ConfigError, match="must be"):
            make()
    assert loop.rate(0, OptimConfig(warmup_steps=0)) == 1.0


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
