"""The configuration of `capsfusion train`. Knows no torch and no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from capsfusion_ray.errors import ConfigError


@dataclass(frozen=True)
class TripleConfig:
    """Where the triples (raw, synthetic, fused) are, and how many of them are kept for validation."""

    path: str = ""  # a JSON array, JSON lines or Parquet file
    raw: str = "laion_2b"
    synthetic: str = "laion_coco"
    fused: str = "capsfuion_official"  # this spelling is that of the published example file
    validation_rows: int = 500  # so many rows at the end of the file are never trained on

    def __post_init__(self) -> None:
        if self.validation_rows < 1:
            raise ConfigError(
                f"data.validation_rows={self.validation_rows}: must be at least 1, because the learning curve is measured on these rows"
            )


@dataclass(frozen=True)
class ModelConfig:
    """The model to start from: a hub id or folder. If `path` is empty, a new Llama of this shape."""

    path: str = ""
    vocab_size: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    ffn: int = 704
    max_positions: int = 512


@dataclass(frozen=True)
class AugmentConfig:
    """How much of the training data is rewritten, as shares of the triples that are drawn."""

    rewrite_share: float = 0.8  # triples whose names, numbers and shared words are replaced
    phrase_share: float = 0.3  # of the rewritten ones: a copied phrase is replaced by one of another caption
    noise_share: float = 0.15  # triples whose raw caption changes its case or loses its punctuation
    copy_share: float = 0.03  # tasks of pure copying, after the curriculum
    copy_only_steps: int = 150  # the curriculum: copy tasks alone for so many steps …
    copy_fade_steps: int = 450  # … then fewer and fewer copy tasks over so many steps


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer. Warm-up, constant rate, then linear decay to zero; Muon for the layers' matrices, AdamW for the rest."""

    steps: int = 4000
    warmup_steps: int = 60
    decay_steps: int = 800  # over so many steps at the end the rate falls to zero
    batch_triples: int = 64
    muon_lr: float = 0.02  # 0: AdamW for all parameters, as in fine-tuning a pretrained model
    adam_lr: float = 2e-3
    weight_decay: float = 0.02
    dropout: float = 0.1  # on the output of each attention and MLP block
    source_loss_weight: float = 0.1  # loss weight of the captions in the prompt; the fused caption has weight 1
    label_smoothing: float = 0.0
    ema: float = 0.998  # decay per step of the averaged weights; the averaged weights are saved
    seed: int = 1

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

    usual_cider: float = 3.3
    usual_rouge_l: float = 0.57
    usual_bleu_4: float = 0.37
    concatenation: float = 2.2  # penalty for both sources pasted one after the other …
    concatenation_from: float = 0.8  # … which begins at this share of their words
    # Without it a model avoids pasting by leaving words out.
    short: float = 0.4  # times the share of the teacher's length that is missing
    repeated_trigram: float = 0.6
    bad_ending: float = 0.5
    lost: float = 0.7  # times the share of the raw caption's numbers and capitalised words that are lost
    # Without it a model learns to join the sources by words without a penalty: "X is a device that features Y" each time.
    unsupported: float = 0.7  # times the share of content words that are in no source and not in the teacher's caption
    rejected: float = 0.4  # for a caption that a gate rejects or that contains a hint of the instruction


@dataclass(frozen=True)
class ReinforceConfig:
    """Self-critical sequence training of a model that is already trained. Needs sacrebleu (the extra `train`)."""

    samples: int = 0  # captions that the model samples per triple, at least 2; 0: supervised training only
    supervised_weight: float = 0.25  # weight of the teacher's caption; the samples have weights with a mean square of 1
    # No metric measures grammar: without this penalty "X is a a that that features Y" gets a high reward.
    drift: float = 0.3  # penalty per nat per token by which a sample is likelier than under the model at the start
    reward: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self) -> None:
        if self.samples < 0 or self.samples == 1:
            raise ConfigError(
                f"reinforce.samples={self.samples}: samples are compared with each other; give 0 or at least 2"
            )


@dataclass(frozen=True)
class TrainOutputConfig:
    """Where the model folder is written. Checkpoints and the learning curve are beside it, in `<path>.run/`."""

    path: str = ""
    max_prompt_tokens: int = 256
    no_repeat_ngram: int = 5  # decode setting that fusion.json asks for; so are the next two
    scoring: Literal["reference", "transformers"] | None = None  # null: fusion.json does not ask for one
    length_penalty: float | None = None
    checkpoint_every: int = 200  # steps
    validate_every: int = 200  # steps


@dataclass(frozen=True)
class TrainClusterConfig:
    """The workers of Ray Train: one process per GPU, or without GPUs one process with `threads` CPU threads."""

    workers: int = 1
    gpu: bool = False
    threads: int = 2
    compile: bool = (
        False  # use torch.compile: 1.4 times as fast on CPUs after a minute of compiling; needs a C++ compiler
    )
    max_failures: int = 3  # how often the workers are restarted from the last checkpoint


@dataclass(frozen=True)
class TrainConfig:
    """capsfusion train"""

    data: TripleConfig = field(default_factory=TripleConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    prompt_template: str = ""  # empty: that of the model's fusion.json, else of the paper; a short one for a new model
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    reinforce: ReinforceConfig = field(default_factory=ReinforceConfig)
    output: TrainOutputConfig = field(default_factory=TrainOutputConfig)
    cluster: TrainClusterConfig = field(default_factory=TrainClusterConfig)
