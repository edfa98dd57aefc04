"""The configuration of jobs/train.py. Knows no torch and no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from capsfusion_ray.errors import ConfigError


@dataclass(frozen=True)
class TripleConfig:
    """Where the triples (raw, synthetic, fused) are, and which of them are never trained on."""

    path: str = ""  # a JSON array, JSON lines or Parquet file
    raw: str = "laion_2b"
    synthetic: str = "laion_coco"
    fused: str = "capsfuion_official"  # spelled so in the published example file
    validation_rows: int = 500  # the last rows of the file

    def __post_init__(self) -> None:
        if self.validation_rows < 1:
            raise ConfigError(
                f"data.validation_rows={self.validation_rows}: must be at least 1; the curve is measured on them"
            )


@dataclass(frozen=True)
class ModelConfig:
    """The model to start from: a hub id or folder, or, where `path` is empty, a Llama of this shape from scratch."""

    path: str = ""
    vocab_size: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    ffn: int = 704
    max_positions: int = 512


@dataclass(frozen=True)
class AugmentConfig:
    """How much of the training data is rewritten, as shares of the triples drawn."""

    rewrite_share: float = 0.8  # triples whose names, numbers and shared words are replaced
    phrase_share: float = 0.3  # of those: a copied phrase replaced by one of another caption
    noise_share: float = 0.15  # triples whose raw caption is recased or loses its punctuation
    copy_share: float = 0.03  # pure copy tasks, after the curriculum
    copy_only_steps: int = 150  # the curriculum: copy tasks alone until here …
    copy_fade_steps: int = 450  # … then fewer and fewer over so many steps


@dataclass(frozen=True)
class OptimConfig:
    """Warm-up, constant rate, linear decay to zero; Muon for the layers' matrices, AdamW for the rest."""

    steps: int = 4000
    warmup_steps: int = 60
    decay_steps: int = 800  # the last steps
    batch_triples: int = 64
    muon_lr: float = 0.02  # 0: AdamW for everything, as for fine-tuning a pretrained model
    adam_lr: float = 2e-3
    weight_decay: float = 0.02
    dropout: float = 0.1  # on what every attention and MLP block adds
    source_loss_weight: float = 0.1  # of the captions in the prompt; the fused caption has weight 1
    label_smoothing: float = 0.0
    ema: float = 0.998  # decay a step of the averaged weights, which are the ones saved
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
                f"optim.source_loss_weight={self.source_loss_weight:g}: must be 0 or more and less than the fused caption's, 1"
            )


@dataclass(frozen=True)
class RewardConfig:
    """What a sampled caption is worth: its likeness to the teacher's, each metric over a usual figure, less its faults."""

    usual_cider: float = 3.3
    usual_rouge_l: float = 0.57
    usual_bleu_4: float = 0.37
    concatenation: float = 2.2  # taken off for both sources pasted one after the other …
    concatenation_from: float = 0.8  # … in part from this share of their words
    short: float = (
        0.4  # for the share of the teacher's length that is missing: leaving out must not be how pasting is avoided
    )
    repeated_trigram: float = 0.6
    bad_ending: float = 0.5
    lost: float = 0.7  # for all numbers and capitalised words of the raw caption lost; less for some
    # Without it a model learns to part the sources by words that cost nothing: "X is a device that features Y", every time.
    unsupported: float = 0.7  # for the share of content words that neither source nor the teacher's caption holds
    rejected: float = 0.4  # by a gate, or with a hint of the instruction in it


@dataclass(frozen=True)
class ReinforceConfig:
    """Self-critical sequence training of a model that is already trained; needs sacrebleu (the extra `train`)."""

    samples: int = 0  # captions drawn from the model for every triple, at least 2; 0: supervised training alone
    supervised_weight: float = 0.25  # of the teacher's caption, beside samples whose weights are 1 in the mean square
    # For each nat a token by which a sample is likelier than the model that this training began from had it. No metric reads
    # grammar: without it "X is a a that that features Y" wins, words that cost nothing and part the sources.
    drift: float = 0.3
    reward: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self) -> None:
        if self.samples < 0 or self.samples == 1:
            raise ConfigError(
                f"reinforce.samples={self.samples}: samples are measured against each other; give 0 or at least 2"
            )


@dataclass(frozen=True)
class TrainOutputConfig:
    """Where the model folder goes; checkpoints and curves stand beside it in `<path>.run/`."""

    path: str = ""
    max_prompt_tokens: int = 256
    no_repeat_ngram: int = 5  # written into fusion.json as the model's wish for decoding, as are the next two
    scoring: Literal["reference", "transformers"] | None = None  # null: no wish
    length_penalty: float | None = None
    checkpoint_every: int = 200  # steps
    validate_every: int = 200  # steps


@dataclass(frozen=True)
class TrainClusterConfig:
    """The Ray Train workers: one process a GPU; without GPUs one process with `threads` CPU threads."""

    workers: int = 1
    gpu: bool = False
    threads: int = 2
    compile: bool = False  # torch.compile: 1.4 times as fast on CPUs after a minute of compiling; needs a C++ compiler
    max_failures: int = 3  # restarts of the worker group from the last checkpoint


@dataclass(frozen=True)
class TrainConfig:
    """jobs/train.py."""

    data: TripleConfig = field(default_factory=TripleConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    prompt_template: str = (
        ""  # empty: what the model's fusion.json says; else the short one from scratch, or the reference's
    )
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    reinforce: ReinforceConfig = field(default_factory=ReinforceConfig)
    output: TrainOutputConfig = field(default_factory=TrainOutputConfig)
    cluster: TrainClusterConfig = field(default_factory=TrainClusterConfig)
