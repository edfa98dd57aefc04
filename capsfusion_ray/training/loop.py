"""The training loop: it takes a config and writes a model folder. Knows no Ray."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from capsfusion_ray.training.augment import Banks
from capsfusion_ray.training.batches import POOL_BATCHES, Batch, Encoder, pad, pool
from capsfusion_ray.training.checkpoint import load_checkpoint, save_checkpoint
from capsfusion_ray.training.config import OptimConfig, TrainConfig
from capsfusion_ray.training.loss import Loss, validation_loss
from capsfusion_ray.training.model import add_dropout, build_encoder, save_model, start_model, template_text
from capsfusion_ray.training.optim import Average, build_optimizers
from capsfusion_ray.training.reinforce import Sampler, SelfCritic
from capsfusion_ray.training.triples import Triple, read_triples

CHECKPOINT = "checkpoint.pt"
CURVE = "curve.jsonl"
TOKENIZER = "tokenizer"  # a folder: the tokenizer is trained once, and a resumed run reads it
VALIDATION_BATCH = 64  # sequences
# Distance between the seeds of two steps. A resumed worker must draw neither its own first numbers again nor those of
# another worker.
_SEEDS_PER_STEP = 1_000_003

Report = Callable[[dict[str, float]], None]
Wrap = Callable[[nn.Module], nn.Module]


def run_folder(cfg: TrainConfig) -> Path:
    """The folder of checkpoint, learning curve and tokenizer, beside the model folder."""
    return Path(f"{cfg.output.path}.run")


def fit(cfg: TrainConfig, report: Report, wrap: Wrap = lambda module: module, rank: int = 0) -> Path:
    """Train, or resume from the last checkpoint, and write the model folder. Returns that folder.

    `report` is called with each row of the learning curve. `wrap` makes the loss module data-parallel (Ray Train's
    `prepare_model`). Only the worker of rank 0 validates and writes.
    """
    run = Training(cfg, wrap, rank)
    run.resume()
    while run.step < cfg.optim.steps:
        run.train_step()
        last = run.step == cfg.optim.steps
        if rank == 0 and (run.step % cfg.output.validate_every == 0 or last):
            report(run.validate())
        if rank == 0 and (run.step % cfg.output.checkpoint_every == 0 or last):
            run.checkpoint()
    folder = Path(cfg.output.path)
    if rank == 0:
        run.save(folder)
    return folder


class Training:
    """One worker's training run: model, optimizers, data, and the number of steps done."""

    def __init__(self, cfg: TrainConfig, wrap: Wrap, rank: int) -> None:
        # The order of these lines is fixed: several of them draw from torch's random generator.
        torch.manual_seed(cfg.optim.seed + rank)
        self._cfg, self._rank = cfg, rank
        self._device = _device(cfg)
        self._work = run_folder(cfg)
        self._work.mkdir(parents=True, exist_ok=True)
        self._triples, self._validation = read_triples(cfg.data)
        self._tokenizer, self._model = start_model(cfg, self._triples, self._work / TOKENIZER)
        self._model.to(self._device)
        self._encoder = build_encoder(
            self._tokenizer, template_text(cfg), cfg.optim.source_loss_weight, ours=not cfg.model.path
        )
        add_dropout(self._model, cfg.optim.dropout)
        self._loss_of = self._wrapped_loss(wrap)
        self._optimizers = build_optimizers(self._model, cfg.optim.muon_lr, cfg.optim.adam_lr, cfg.optim.weight_decay)
        self._base_lrs = [optimizer.param_groups[0]["lr"] for optimizer in self._optimizers]
        self._average = Average(self._model, cfg.optim.ema)
        self._critic = self._build_critic() if cfg.reinforce.samples else None
        self._pools = _Pools(cfg, self._triples, self._encoder, self._tokenizer.pad_token_id, rank)
        self._held_out = _batches(self._validation, self._encoder, self._tokenizer.pad_token_id)
        self._since = _SinceValidation()
        self.step = 0

    def _wrapped_loss(self, wrap: Wrap) -> nn.Module:
        loss = Loss(self._model, self._cfg.optim.label_smoothing)
        return wrap(torch.compile(loss, dynamic=True) if self._cfg.cluster.compile else loss)

    def _build_critic(self) -> SelfCritic:
        from capsfusion_ray.training.reward import Reward  # needs sacrebleu

        sampler = Sampler(self._model, self._tokenizer, self._encoder)
        reward = Reward(self._cfg.reinforce.reward, self._triples)
        return SelfCritic(self._cfg.reinforce, sampler, reward, self._tokenizer.pad_token_id)

    def resume(self) -> None:
        """Restore the last checkpoint, if there is one. This also restores torch's random generator."""
        self.step = load_checkpoint(self._work / CHECKPOINT, self._model, self._optimizers, self._average)
        if self.step and self._rank:
            # The checkpoint holds the random state of the worker of rank 0.
            torch.manual_seed(self._cfg.optim.seed + self._rank + _SEEDS_PER_STEP * self.step)
        if self._rank == 0:
            _drop_rows_after(self.step, self._work / CURVE)

    def train_step(self) -> None:
        """Take one step on the next batch."""
        batch = self._pools.batch(self.step)
        if self._critic:
            batch, reward = self._critic(batch.triples)
            self._since.rewards.append(reward)
        self._model.train()
        loss = self._loss_of(batch, self._device)
        loss.backward()
        scale = rate(self.step, self._cfg.optim)
        for optimizer, base in zip(self._optimizers, self._base_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = base * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._average.update(self._model, self.step)
        self.step += 1
        self._since.losses.append(float(loss.detach()))
        self._since.tokens += batch.ids_TL.numel()

    def validate(self) -> dict[str, float]:
        """Measure the averaged weights on the validation triples. Appends a row to the learning curve and returns it."""
        since, seconds = self._since, time.monotonic() - self._since.began
        self._average.swap(self._model)
        loss = validation_loss(self._model, self._held_out, self._device)
        reward = self._critic.validate(self._validation) if self._critic else 0.0
        self._average.swap(self._model)
        row = {
            "step": self.step,
            "train_loss": sum(since.losses) / len(since.losses),
            "validation_loss": loss,
            "rate": rate(self.step - 1, self._cfg.optim),
            "tokens_per_s": since.tokens / seconds,
        }
        if self._critic:
            row |= {"train_reward": sum(since.rewards) / len(since.rewards), "validation_reward": reward}
        with (self._work / CURVE).open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        self._since = _SinceValidation()
        return {key: float(value) for key, value in row.items()}

    def checkpoint(self) -> None:
        """Write the checkpoint of this step over the last one."""
        save_checkpoint(self._work / CHECKPOINT, self.step, self._model, self._optimizers, self._average)

    def save(self, folder: Path) -> None:
        """Write the averaged weights as a model folder. Call it once, after the last step."""
        self._average.swap(self._model)
        save_model(self._model, self._tokenizer, self._cfg, folder)


class _SinceValidation:
    """What the row of the learning curve sums up: the steps since the last validation."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rewards: list[float] = []
        self.tokens = 0
        self.began = time.monotonic()


class _Pools:
    """The batch of each step. It depends only on the config, the rank and the step, so resuming needs no saved state."""

    def __init__(self, cfg: TrainConfig, triples: Sequence[Triple], encoder: Encoder, pad_id: int, rank: int) -> None:
        self._cfg, self._triples, self._encoder, self._pad_id, self._rank = cfg, triples, encoder, pad_id, rank
        self._banks = Banks.collect(triples, cfg.optim.seed)
        self._number = -1  # of the pool that is held
        self._held: list[Batch] = []

    def batch(self, step: int) -> Batch:
        number = step // POOL_BATCHES
        if number != self._number:
            self._held = pool(number, self._triples, self._banks, self._encoder, self._cfg, self._pad_id, self._rank)
            self._number = number
        return self._held[step % POOL_BATCHES]


def rate(step: int, cfg: OptimConfig) -> float:
    """Return the learning rate of this step, as a share of the base learning rate."""
    return min(1.0, (step + 1) / max(1, cfg.warmup_steps), (cfg.steps - step) / cfg.decay_steps)


def _device(cfg: TrainConfig) -> torch.device:
    device = torch.device("cuda" if cfg.cluster.gpu else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(cfg.cluster.threads)
    return device


def _batches(triples: Sequence[Triple], encoder: Encoder, pad_id: int) -> list[Batch]:
    rows = sorted((encoder(triple) for triple in triples), key=lambda row: len(row[0]))
    return [pad(rows[i : i + VALIDATION_BATCH], pad_id) for i in range(0, len(rows), VALIDATION_BATCH)]


def _drop_rows_after(step: int, curve: Path) -> None:
    """Remove the rows that a killed run wrote after its last checkpoint: these steps are measured again."""
    if curve.exists():
        lines = [line for line in curve.read_text("utf-8").splitlines() if json.loads(line)["step"] <= step]
        curve.write_text("".join(f"{line}\n" for line in lines), "utf-8")
