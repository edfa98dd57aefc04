"""A training run of seconds, and the exception by which a test kills it."""

from capsfusion_ray.training.config import (
    AugmentConfig,
    ModelConfig,
    OptimConfig,
    TrainClusterConfig,
    TrainConfig,
    TrainOutputConfig,
    TripleConfig,
)


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
