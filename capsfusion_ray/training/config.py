"""The configuration of `capsfusion train`. Knows no torch and no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from capsfusion_ray.config import section, setting
from capsfusion_ray.errors import ConfigError


@dataclass(frozen=True)
class TripleConfig:
    """Where the triples (raw, synthetic, fused) are, and how many of them are kept for validation."""

    path: str = setting("", "a JSON array, JSON lines or Parquet file", common=True)
    raw: str = setting("laion_2b", "column of the raw caption")
    synthetic: str = setting("laion_coco", "column of the synthetic caption")
    fused: str = setting("capsfuion_official", "this spelling is that of the published example file")
    validation_rows: int = setting(500, "the last rows of the file, which are never trained on")

    def __post_init__(self) -> None:
        if self.validation_rows < 1:
            raise ConfigError(
                f"data.validation_rows={self.validation_rows}: must be at least 1, because the learning curve is measured on these rows"
            )


@dataclass(frozen=True)
class ModelConfig:
    """The model to start from: a hub id or folder. If `path` is empty, a new Llama of this shape."""

    path: str = setting("", "a hub id or a folder; empty: a new Llama of the shape below", common=True)
    vocab_size: int = setting(4096, "tokens of the new model's tokenizer")
    hidden: int = setting(256, "width of the new model")
    layers: int = setting(6, "layers of the new model")
    heads: int = setting(8, "attention heads per layer of the new model")
    ffn: int = setting(704, "width of the MLP blocks of the new model")
    max_positions: int = setting(512, "longest sequence of the new model, in tokens")


@dataclass(frozen=True)
class AugmentConfig:
    """How much of the training data is rewritten, as shares of the triples that are drawn."""

    rewrite_share: float = setting(0.8, "triples whose names, numbers and shared words are replaced")
    phrase_share: float = setting(0.3, "of the rewritten ones: a copied phrase is replaced by one of another caption")
    noise_share: float = setting(0.15, "triples whose raw caption changes its case or loses its punctuation")
    copy_share: float = setting(0.03, "tasks of pure copying, after the curriculum")
    copy_only_steps: int = setting(150, "steps of the curriculum with copy tasks only")
    copy_fade_steps: int = setting(450, "steps over which the copy tasks become fewer, after these")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer. Warm-up, constant rate, then linear decay to zero; Muon for the layers' matrices, AdamW for the rest."""

    steps: int = setting(4000, "training steps", common=True)
    warmup_steps: int = setting(60, "steps in which the learning rate grows")
    decay_steps: int = setting(800, "steps at the end in which the learning rate falls to 0")
    batch_triples: int = setting(64, "triples per step", common=True)
    muon_lr: float = setting(0.02, "0: AdamW for all parameters, as in fine-tuning a pretrained model")
    adam_lr: float = setting(2e-3, "learning rate of AdamW", common=True)
    weight_decay: float = setting(0.02, "decay of the weights per step and learning rate")
    dropout: float = setting(0.1, "on the output of each attention and MLP block")
    source_loss_weight: float = setting(
        0.1, "loss weight of the captions in the prompt; the fused caption has weight 1"
    )
    label_smoothing: float = setting(0.0, "of the loss on the fused caption")
    ema: float = setting(0.998, "decay per step of the averaged weights; the averaged weights are saved")
    seed: int = setting(1, "of all random numbers")

    def __post_init__(self) -> None:
        if not 0 < self.decay_steps <= self.steps:
            raise ConfigError(f"optim.decay_steps={self.decay_steps}: must be 1 to optim.steps={self.steps}")
        if self.warmup_steps < 0 or self.batch_triples < 1:
            raise ConfigError(
                f"optim.warmup_steps={self.warmup_steps}, optim.batch_triples={self.batch_triples}: must be at least 0 and 1"
            )
        if not 0 <= self.source_loss_weight < 1:
            raise ConfigError(
                f"optim.source_loss_weight={self.source_loss_weight:g}: must be at least 0 and less than 1, the weight of the fused caption"
            )


@dataclass(frozen=True)
class RewardConfig:
    """The reward of a sampled caption: its likeness to the teacher's caption, minus a penalty per fault.

    The likeness is the mean of three metrics, each divided by its usual value.
    """

    usual_cider: float = setting(3.3, "CIDEr by which that of a sample is divided")
    usual_rouge_l: float = setting(0.57, "ROUGE-L by which that of a sample is divided")
    usual_bleu_4: float = setting(0.37, "BLEU-4 by which that of a sample is divided")
    concatenation: float = setting(2.2, "penalty for both sources pasted one after the other")
    concatenation_from: float = setting(0.8, "share of the words from which a part of that penalty counts")
    # Without it a model avoids pasting by leaving words out.
    short: float = setting(0.4, "times the share of the teacher's length that is missing")
    repeated_trigram: float = setting(0.6, "penalty for repeated trigrams")
    bad_ending: float = setting(0.5, "penalty for an ending inside a sentence")
    lost: float = setting(0.7, "times the share of the raw caption's numbers and capitalised words that are lost")
    # Without it a model learns to join the sources by words without a penalty: "X is a device that features Y" each time.
    unsupported: float = setting(
        0.7, "times the share of content words that are in no source and not in the teacher's caption"
    )
    rejected: float = setting(0.4, "for a caption that a gate rejects or that contains a hint of the instruction")


@dataclass(frozen=True)
class ReinforceConfig:
    """Self-critical sequence training of a model that is already trained. Needs sacrebleu (the extra `train`)."""

    samples: int = setting(
        0, "captions that the model samples per triple, at least 2; 0: supervised training only", common=True
    )
    supervised_weight: float = setting(
        0.25, "weight of the teacher's caption; the samples have weights with a mean square of 1"
    )
    # No metric measures grammar: without this penalty "X is a a that that features Y" gets a high reward.
    drift: float = setting(
        0.3, "penalty per nat per token by which a sample is likelier than under the model at the start"
    )
    reward: RewardConfig = section(RewardConfig)

    def __post_init__(self) -> None:
        if self.samples < 0 or self.samples == 1:
            raise ConfigError(
                f"reinforce.samples={self.samples}: samples are compared with each other; give 0 or at least 2"
            )


@dataclass(frozen=True)
class TrainOutputConfig:
    """Where the model folder is written. Checkpoints and the learning curve are beside it, in `<path>.run/`."""

    path: str = setting("", "a folder", common=True)
    max_prompt_tokens: int = setting(256, "longest prompt, in tokens; written into fusion.json")
    no_repeat_ngram: int = setting(5, "written into fusion.json, as a decoding setting of the model")
    scoring: Literal["reference", "transformers"] | None = setting(None, "written into fusion.json; null: not written")
    length_penalty: float | None = setting(None, "written into fusion.json; null: not written")
    checkpoint_every: int = setting(200, "steps")
    validate_every: int = setting(200, "steps")


@dataclass(frozen=True)
class TrainClusterConfig:
    """The workers of Ray Train: one process per GPU, or without GPUs one process with `threads` CPU threads."""

    workers: int = setting(1, "processes; with gpu=true one per GPU", common=True)
    gpu: bool = setting(False, "train on GPUs", common=True)
    threads: int = setting(2, "CPU threads per process")
    compile: bool = setting(
        False, "use torch.compile: 1.4 times as fast on CPUs after a minute of compiling; needs a C++ compiler"
    )
    max_failures: int = setting(3, "how often the workers are restarted from the last checkpoint")


@dataclass(frozen=True)
class TrainConfig:
    """capsfusion train"""

    data: TripleConfig = section(TripleConfig, required=["path"])
    model: ModelConfig = section(ModelConfig)
    prompt_template: str = setting(
        "", "empty: that of the model's fusion.json, else of the paper; a short one for a new model"
    )
    augment: AugmentConfig = section(AugmentConfig)
    optim: OptimConfig = section(OptimConfig)
    reinforce: ReinforceConfig = section(ReinforceConfig)
    output: TrainOutputConfig = section(TrainOutputConfig, required=["path"])
    cluster: TrainClusterConfig = section(TrainClusterConfig)
