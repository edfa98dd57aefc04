"""Self-critical training: better samples become likelier, worse ones less likely, and a killed run goes on."""

import dataclasses
import random

import pytest
import torch
from training_runs import Killed, recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from capsfusion_ray.errors import ConfigError
from capsfusion_ray.training import loop
from capsfusion_ray.training.batches import MAX_NEW_TOKENS
from capsfusion_ray.training.config import AugmentConfig, ModelConfig, ReinforceConfig, RewardConfig
from capsfusion_ray.training.loss import Loss
from capsfusion_ray.training.model import build_encoder, template_text
from capsfusion_ray.training.reinforce import Sampler, SelfCritic, advantage
from capsfusion_ray.training.reward import Reward
from capsfusion_ray.training.triples import Triple, passes, read_triples

TRIPLE = Triple(
    "Anna Berg Leather Jacket (1987)",
    "A brown leather jacket hangs on a wall.",
    "A brown leather jacket from 1987 by Anna Berg hangs on a wall.",
)
OTHERS = [Triple("a", "b", f"A {thing} stands in the garden.") for thing in ("chair", "table", "lamp", "horse")]


@pytest.fixture(scope="module")
def reward():
    return Reward(RewardConfig(), [TRIPLE, *OTHERS])


@pytest.fixture(scope="module")
def supervised(triples_file, tmp_path_factory):
    cfg = recipe(triples_file, tmp_path_factory.mktemp("supervised") / "model")
    return loop.fit(cfg, lambda row: None)


def second_stage(triples_file, start, path, steps=4):
    cfg = recipe(triples_file, path, steps)
    return dataclasses.replace(
        cfg,
        model=ModelConfig(path=str(start)),
        augment=AugmentConfig(copy_share=0.0, copy_only_steps=0, copy_fade_steps=0),
        optim=dataclasses.replace(cfg.optim, batch_triples=4, decay_steps=2),
        reinforce=ReinforceConfig(samples=2),
        output=dataclasses.replace(cfg.output, checkpoint_every=2, validate_every=2),
    )


def test_the_teachers_caption_is_worth_more_than_any_faulty_one(reward):
    whole = reward(TRIPLE, TRIPLE.fused)
    assert reward.faults(TRIPLE, TRIPLE.fused) == 0
    for faulty in (
        "A brown leather jacket from 1987 by Anna Berg hangs on a",  # no ending
        "A leather jacket hangs on a wall.",  # number and name lost
        "A brown leather jacket hangs on a wall. A brown leather jacket from 1987 by Anna Berg.",  # said twice
        "Anna Berg Leather Jacket (1987) A brown leather jacket hangs on a wall.",  # pasted
        "The two sentences describe a jacket from 1987 by Anna Berg.",  # the instruction's words
        "A brown leather jacket from 1999 by Anna Berg hangs on a wall.",  # a number of its own
        "A leather jacket from 1987 by Anna Berg is a device that hangs on a wall.",  # a word of its own
        "",
    ):
        assert reward(TRIPLE, faulty) < whole, faulty
        assert reward.faults(TRIPLE, faulty) > 0, faulty


def test_pasting_costs_in_part_before_it_costs_all():
    reward = Reward(RewardConfig(short=0), [TRIPLE, *OTHERS])
    triple = dataclasses.replace(
        TRIPLE, synthetic="A brown leather jacket hangs on a white garden wall."
    )  # 15 words with the raw ones
    pasted = f"{triple.raw} {triple.synthetic}".split()
    all_, most, some = (reward.faults(triple, " ".join(pasted[:n]).rstrip(".") + ".") for n in (15, 13, 11))
    assert 0 == some < most < all_


def test_filler_does_not_hide_that_both_sources_are_pasted(reward):
    filler = "is a product that stands out for what it features and shows, namely that"
    padded = f"The {TRIPLE.raw} {filler} a brown leather jacket hangs on a wall."
    assert reward.faults(TRIPLE, padded) > RewardConfig().concatenation


def test_leaving_out_costs_by_what_is_missing_and_length_beyond_the_teachers_earns_nothing(reward):
    whatever = Reward(RewardConfig(short=0), [TRIPLE, *OTHERS])
    for caption, missing in (
        (TRIPLE.fused, 0),
        ("A brown leather jacket hangs.", 8 / 13),
        (f"{TRIPLE.fused} So it is.", 0),
    ):
        price = reward.faults(TRIPLE, caption) - whatever.faults(TRIPLE, caption)
        assert price == pytest.approx(RewardConfig().short * missing)


def test_a_student_learns_no_hint_of_the_instruction():
    assert passes(TRIPLE)
    assert not passes(
        dataclasses.replace(TRIPLE, fused="A well-structured and detailed leather jacket hangs on a wall.")
    )


def test_samples_are_measured_against_each_other():
    better_TK = advantage(torch.tensor([[0.2, 0.4, 0.9], [0.5, 0.5, 0.5]]))
    assert better_TK[0].argsort().tolist() == [0, 1, 2]
    assert better_TK.sum(dim=1).abs().max() < 1e-5
    assert (better_TK[1] == 0).all()
    assert advantage(torch.zeros(2, 3)).isfinite().all()


def test_one_sample_has_nothing_to_be_measured_against():
    with pytest.raises(ConfigError, match=r"reinforce\.samples=1"):
        ReinforceConfig(samples=1)


def test_greedy_samples_are_the_models_own_and_end_at_the_end_token(supervised, triples_file):
    cfg = recipe(triples_file, supervised)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(supervised), AutoTokenizer.from_pretrained(supervised)
    encoder = build_encoder(tokenizer, template_text(cfg), 0.0, ours=True)
    triples = read_triples(cfg.data)[1][:5]
    for triple, [(ids, nats)] in zip(triples, Sampler(model, tokenizer, encoder)(triples, 0), strict=True):
        prompt = torch.tensor([encoder.prompt(triple)])
        alone = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=MAX_NEW_TOKENS)
        assert ids[:5] == alone[0, prompt.shape[1] :].tolist()[:5]  # later tokens may differ: bfloat16, another padding
        assert ids.count(tokenizer.eos_token_id) <= 1
        whole = torch.tensor([encoder.prompt(triple) + ids])
        with torch.no_grad():
            logits = model.float()(whole).logits[0, prompt.shape[1] - 1 : -1]
        assert nats == pytest.approx(logits.log_softmax(dim=-1)[range(len(ids)), ids].sum().item(), rel=0.05, abs=0.3)
    assert all(len(drawn) == 3 for drawn in Sampler(model, tokenizer, encoder)(triples, 3))


@pytest.mark.parametrize(("drift", "becomes_likelier"), [(0.0, True), (30.0, False)])
def test_what_is_rewarded_becomes_likelier_unless_drifting_costs_more(
    supervised, triples_file, drift, becomes_likelier
):
    """A reward of our own choice, the count of one letter: gradient steps on the critic's batches raise it."""
    cfg = recipe(triples_file, supervised)
    torch.manual_seed(0)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(supervised, dtype=torch.float32),
        AutoTokenizer.from_pretrained(supervised),
    )
    encoder = build_encoder(tokenizer, template_text(cfg), 0.0, ours=True)
    triples = random.Random(0).choices(read_triples(cfg.data)[0], k=8)
    critic = SelfCritic(
        ReinforceConfig(samples=4, supervised_weight=0.0, drift=drift),
        Sampler(model, tokenizer, encoder),
        lambda triple, text: text.count("e") / max(1, len(text)),
        tokenizer.pad_token_id,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    seen = []
    for _ in range(30):
        batch, mean = critic(triples)
        Loss(model)(batch, torch.device("cpu")).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(mean)
    assert (sum(seen[-5:]) > 1.5 * sum(seen[:5])) == becomes_likelier


def test_a_killed_second_stage_goes_on_and_keeps_the_prompt_of_the_first(supervised, triples_file, tmp_path):
    cfg = second_stage(triples_file, supervised, tmp_path / "model")

    def die(row):
        if row["step"] == 4:
            raise Killed

    with pytest.raises(Killed):
        loop.fit(cfg, die)
    rows = []
    folder = loop.fit(cfg, rows.append)
    assert [row["step"] for row in rows] == [4]
    assert {"train_reward", "validation_reward"} <= rows[0].keys()
    assert (folder / "fusion.json").read_text() == (supervised / "fusion.json").read_text()
    whole = loop.fit(second_stage(triples_file, supervised, tmp_path / "whole"), lambda row: None)
    a, b = (AutoModelForCausalLM.from_pretrained(f) for f in (folder, whole))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
