"""The training loop: config in, model folder out. Knows no Ray; the caller is told of every validation.

B sequences, L tokens, V vocabulary.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from capsfusion_ray.core import prompt
from capsfusion_ray.engines.loading import load_to_train, one_line
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.models.fusion_file import DECODE_KEYS, FUSION_FILE, read_fusion_file
from capsfusion_ray.storage import Store
from capsfusion_ray.training.augment import Banks
from capsfusion_ray.training.batches import (
    POOL_BATCHES,
    Batch,
    Encoder,
    PieceEncoder,
    TextEncoder,
    cached_by_word,
    pad,
    pool,
)
from capsfusion_ray.training.config import ModelConfig, OptimConfig, TrainConfig
from capsfusion_ray.training.optim import Average, build_optimizers
from capsfusion_ray.training.reinforce import Sampler, SelfCritic
from capsfusion_ray.training.tokenizer import SHORT_TEMPLATE, train_tokenizer
from capsfusion_ray.training.triples import Triple, read_triples

CHECKPOINT = "checkpoint.pt"
CURVE = "curve.jsonl"
TOKENIZER = "tokenizer"  # a folder: trained once, read back when a killed run goes on
VALIDATION_BATCH = 64  # sequences
_STEPS_APART = 1_000_003  # of seeds: a resumed worker draws neither its own first numbers again nor another's
_FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_ATTENTION = {"cpu": [SDPBackend.MATH], "cuda": _FUSED}

Report = Callable[[dict[str, float]], None]


def run_folder(cfg: TrainConfig) -> Path:
    return Path(f"{cfg.output.path}.run")


def fit(cfg: TrainConfig, report: Report, wrap: Callable[[nn.Module], nn.Module] = lambda m: m, rank: int = 0) -> Path:
    """Train, or go on from the last checkpoint, and write the model folder. Returns the folder.

    `wrap` makes the model data-parallel (Ray Train's `prepare_model`); rank 0 alone writes.
    """
    torch.manual_seed(cfg.optim.seed + rank)
    device = torch.device("cuda" if cfg.cluster.gpu else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(cfg.cluster.threads)
    work = run_folder(cfg)
    work.mkdir(parents=True, exist_ok=True)
    triples, validation = read_triples(cfg.data)
    banks = Banks.collect(triples, cfg.optim.seed)
    tokenizer, plain = _start(cfg, triples, work / TOKENIZER)
    plain.to(device)
    encoder = build_encoder(tokenizer, template_text(cfg), cfg.optim.source_loss_weight, ours=not cfg.model.path)
    _add_dropout(plain, cfg.optim.dropout)
    weighed = Loss(plain, cfg.optim.label_smoothing)
    loss_of = wrap(torch.compile(weighed, dynamic=True) if cfg.cluster.compile else weighed)
    optimizers = build_optimizers(plain, cfg.optim.muon_lr, cfg.optim.adam_lr, cfg.optim.weight_decay)
    base_lrs = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    average = Average(plain, cfg.optim.ema)
    # Before the resume, which restores the random state: building the sampler's copy of the model draws numbers.
    critic = _critic(cfg, plain, tokenizer, encoder, triples) if cfg.reinforce.samples else None
    step = _resume(work / CHECKPOINT, plain, optimizers, average)
    if step and rank:
        torch.manual_seed(
            cfg.optim.seed + rank + _STEPS_APART * step
        )  # the checkpoint holds the first worker's random state
    if rank == 0:
        _forget_after(step, work / CURVE)
    held_out = _batches(validation, encoder, tokenizer.pad_token_id)
    batches: list[Batch] = []
    losses, rewards, tokens, began = [], [], 0, time.monotonic()
    while step < cfg.optim.steps:
        if not batches or step % POOL_BATCHES == 0:
            whole = pool(step // POOL_BATCHES, triples, banks, encoder, cfg, tokenizer.pad_token_id, rank)
            batches = whole[step % POOL_BATCHES :]
        batch = batches.pop(0)
        if critic:
            batch, reward = critic(batch.triples)
            rewards.append(reward)
        plain.train()
        loss = loss_of(batch, device)
        loss.backward()
        scale = rate(step, cfg.optim)
        for optimizer, base in zip(optimizers, base_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = base * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update(plain, step)
        step += 1
        losses.append(float(loss.detach()))
        tokens += batch.ids_TL.numel()
        last = step == cfg.optim.steps
        if rank == 0 and (step % cfg.output.validate_every == 0 or last):
            seconds = time.monotonic() - began
            average.swap(plain)
            held = validate(plain, held_out, device)
            held_reward = critic.validate(validation) if critic else 0.0
            average.swap(plain)
            row = {
                "step": step,
                "train_loss": sum(losses) / len(losses),
                "validation_loss": held,
                "rate": scale,
                "tokens_per_s": tokens / seconds,
            }
            if critic:
                row |= {"train_reward": sum(rewards) / len(rewards), "validation_reward": held_reward}
            with (work / CURVE).open("a") as lines:
                lines.write(json.dumps(row) + "\n")
            report({key: float(value) for key, value in row.items()})
            losses, rewards, tokens, began = [], [], 0, time.monotonic()
        if rank == 0 and (step % cfg.output.checkpoint_every == 0 or last):
            _checkpoint(work / CHECKPOINT, step, plain, optimizers, average)
    folder = Path(cfg.output.path)
    if rank == 0:
        average.swap(plain)
        save_model(plain, tokenizer, cfg, folder)
    return folder


def template_text(cfg: TrainConfig) -> str:
    """The prompt of the model: as configured, or as the model to start from wishes, or the one for its kind."""
    if cfg.prompt_template or not cfg.model.path:
        return cfg.prompt_template or SHORT_TEMPLATE
    return read_fusion_file(Store(cfg.model.path)).get("prompt_template") or prompt.TEMPLATE


def build_encoder(tokenizer: Any, template: str, source_weight: float, ours: bool) -> Encoder:
    """`ours`: the tokenizer is tokenizer.py's, which never merges over a space, so words can be cached."""
    parsed = prompt.Template.parse(template)
    if not ours:
        return TextEncoder(parsed, tokenizer, tokenizer.eos_token_id, source_weight)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return PieceEncoder(
        cached_by_word(encode),
        list(tokenizer(parsed.before_raw)["input_ids"]),
        encode(parsed.between),
        encode(parsed.after_synthetic),
        tokenizer.eos_token_id,
        source_weight,
    )


class Loss(nn.Module):
    """The language model and its loss as one module, so that data parallelism wraps both."""

    def __init__(self, model: Any, smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.smoothing = model, smoothing

    def forward(self, batch: Batch, device: torch.device) -> Tensor:
        """Mean cross-entropy over the tokens with a weight, by weight; a negative one makes its token less likely."""
        ids_BL, weights_BL = batch.ids_TL.to(device), batch.weights_TL.to(device)[:, 1:]
        scored_N = (weights_BL != 0).flatten().nonzero()[:, 0]
        # On CPUs the backward pass of torch's fused attention takes far longer than that of plain matrix products.
        with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(_ATTENTION[device.type]):
            hidden_BLD = self.model.base_model(input_ids=ids_BL[:, :-1], use_cache=False).last_hidden_state
            # Logits only where they count: the table has more columns than all other layers together.
            logits_NV = self.model.get_output_embeddings()(hidden_BLD.flatten(0, 1).index_select(0, scored_N))
        labels_N = ids_BL[:, 1:].flatten()[scored_N]
        losses_N = F.cross_entropy(logits_NV.float(), labels_N, reduction="none", label_smoothing=self.smoothing)
        weights_N = weights_BL.flatten()[scored_N]
        return (losses_N * weights_N).sum() / weights_N.abs().sum()


@torch.no_grad()
def validate(model: nn.Module, batches: Sequence[Batch], device: torch.device) -> float:
    """Mean cross-entropy a token of the fused captions alone, in nats."""
    model.eval()
    loss_of = Loss(model)
    total, n = 0.0, 0.0
    for batch in batches:
        fused = Batch(batch.ids_TL, (batch.weights_TL == 1.0).float())
        count = float(fused.weights_TL.sum())
        total += float(loss_of(fused, device)) * count
        n += count
    return total / n


def rate(step: int, cfg: OptimConfig) -> float:
    """The share of the base learning rate at this step."""
    return min(1.0, (step + 1) / max(1, cfg.warmup_steps), (cfg.steps - step) / cfg.decay_steps)


def save_model(model: Any, tokenizer: Any, cfg: TrainConfig, folder: Path) -> None:
    """A standard model folder in bfloat16, with the prompt template and the decoding it wishes for in fusion.json."""
    half = type(model)(model.config)
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    wish = {
        "prompt_template": template_text(cfg),
        "max_prompt_tokens": cfg.output.max_prompt_tokens,
        "decode": {name: value for name in DECODE_KEYS if (value := getattr(cfg.output, name)) is not None},
    }
    (folder / FUSION_FILE).write_text(json.dumps(wish, indent=2) + "\n", encoding="utf-8")


def _start(cfg: TrainConfig, triples: Sequence[Triple], saved: Path) -> tuple[Any, Any]:
    """Tokenizer and model, pretrained or from scratch; parameters in float32."""
    if cfg.model.path:
        tokenizer, model = load_to_train(cfg.model.path)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer, model
    if (saved / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(saved)
    else:
        tokenizer = train_tokenizer((s for t in triples for s in (t.raw, t.synthetic, t.fused)), cfg.model.vocab_size)
        tokenizer.save_pretrained(saved)
    return tokenizer, _scratch(cfg.model, tokenizer)


def _scratch(cfg: ModelConfig, tokenizer: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=cfg.hidden,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.heads,
        intermediate_size=cfg.ffn,
        max_position_embeddings=cfg.max_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        # Blocks that start as the identity: the first steps then train the tied table, not noise through the depth.
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(p)
    return model


def _add_dropout(model: nn.Module, share: float) -> None:
    """Dropout on the output of every attention and MLP block; a hook, because the architecture has none."""

    def drop(module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (F.dropout(output[0], share, module.training), *output[1:])
        return F.dropout(output, share, module.training)

    if share > 0:
        for name, module in model.named_modules():
            if name.endswith((".self_attn", ".mlp")):
                module.register_forward_hook(drop)


def _critic(cfg: TrainConfig, model: Any, tokenizer: Any, encoder: Encoder, triples: Sequence[Triple]) -> SelfCritic:
    from capsfusion_ray.training.reward import Reward  # needs sacrebleu

    reward = Reward(cfg.reinforce.reward, triples)
    return SelfCritic(cfg.reinforce, Sampler(model, tokenizer, encoder), reward, tokenizer.pad_token_id)


def _batches(triples: Sequence[Triple], encoder: Encoder, pad_id: int) -> list[Batch]:
    rows = sorted((encoder(triple) for triple in triples), key=lambda row: len(row[0]))
    return [pad(rows[i : i + VALIDATION_BATCH], pad_id) for i in range(0, len(rows), VALIDATION_BATCH)]


def _checkpoint(
    path: Path, step: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], average: Average
) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "average": average.values,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    half_written = path.with_suffix(".tmp")
    torch.save(state, half_written)
    os.replace(half_written, path)  # a kill leaves the old checkpoint or the new one, never half of one


def _resume(path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], average: Average) -> int:
    """The step to go on from: 0 without a checkpoint."""
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # by what is damaged, or is no tensor
        raise ConfigError(
            f"{path}: no checkpoint that can be read ({one_line(error)}); remove it, and the training begins anew"
        ) from error
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    for mine, saved in zip(average.values, state["average"], strict=True):
        mine.copy_(saved)
    torch.set_rng_state(state["rng"])
    if state.get("cuda_rng") is not None and torch.cuda.is_available():  # checkpoints of before have none
        torch.cuda.set_rng_state(state["cuda_rng"])
    return int(state["step"])


def _forget_after(step: int, curve: Path) -> None:
    """What a killed run measured after its last checkpoint is measured again."""
    if curve.exists():
        lines = [line for line in curve.read_text("utf-8").splitlines() if json.loads(line)["step"] <= step]
        curve.write_text("".join(f"{line}\n" for line in lines), "utf-8")
