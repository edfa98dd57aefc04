"""Run the training loop on Ray Train: start workers, restart them after a failure, and draw the learning curve."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import ray

from capsfusion_ray.config import ClusterConfig
from capsfusion_ray.config.extras import imports_of
from capsfusion_ray.errors import ConfigError, EngineError
from capsfusion_ray.run import cluster
from capsfusion_ray.training.config import TrainConfig
from capsfusion_ray.training.loop import CURVE, fit, run_folder
from capsfusion_ray.training.triples import located

with imports_of("train"):
    import matplotlib  # draw_curve needs it when hours of training are over: a missing package is found before
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer


def train(cfg: TrainConfig) -> dict[str, Any]:
    """Train, or resume a killed run. Returns the model folder and the last row of the learning curve.

    Raises ConfigError for a config that cannot be trained with, EngineError if the training failed.
    """
    cfg = _with_absolute_paths(cfg)
    work = run_folder(cfg)
    work.mkdir(parents=True, exist_ok=True)
    _refuse_another_run(cfg, work / "config.json")
    started_here = not ray.is_initialized()
    if started_here:
        cluster.connect(ClusterConfig())
    try:
        _trainer(cfg, work).fit()
    except ray.train.TrainingFailedError as error:
        raise EngineError(
            f"{cfg.output.path}: the training failed ({error}); give the same command again to resume it"
        ) from error
    finally:
        if started_here:
            cluster.disconnect()
    curve = [json.loads(line) for line in (work / CURVE).read_text(encoding="utf-8").splitlines()]
    draw_curve(curve, work)
    return {"model": cfg.output.path, **curve[-1]}


def _with_absolute_paths(cfg: TrainConfig) -> TrainConfig:
    """Make relative paths absolute, because Ray starts its workers in another folder."""
    triples = located(cfg.data.path)
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, path=str(triples.resolve())),
        model=dataclasses.replace(cfg.model, path=_absolute(cfg.model.path)),
        output=dataclasses.replace(cfg.output, path=str(Path(cfg.output.path).resolve())),
    )


def _trainer(cfg: TrainConfig, work: Path) -> TorchTrainer:
    resources = {"GPU": 1.0} if cfg.cluster.gpu else {"CPU": float(cfg.cluster.threads)}
    return TorchTrainer(
        _worker,
        train_loop_config={"config": cfg},
        scaling_config=ScalingConfig(
            num_workers=cfg.cluster.workers, use_gpu=cfg.cluster.gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(work / "ray"),
            failure_config=FailureConfig(max_failures=cfg.cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )


def _absolute(model: str) -> str:
    """Return the absolute path of a folder, and a hub id unchanged."""
    return str(Path(model).resolve()) if model and Path(model).exists() else model


def _worker(loop: dict[str, TrainConfig]) -> None:
    import ray.train.torch

    context = ray.train.get_context()
    rank = context.get_world_rank()

    def wrap(model: Any) -> Any:
        if context.get_world_size() == 1:
            return model
        # Otherwise each gradient is in memory twice: as the parameter's own, and in the bucket that is sent around.
        return ray.train.torch.prepare_model(model, parallel_strategy_kwargs={"gradient_as_bucket_view": True})

    fit(loop["config"], lambda row: None, wrap, rank)


def _refuse_another_run(cfg: TrainConfig, path: Path) -> None:
    """Refuse a config whose recipe differs from that of the checkpoint. The steps, the cluster and the output may differ."""
    recipe = dataclasses.asdict(cfg)
    del recipe["cluster"], recipe["output"]
    for name in ("steps", "decay_steps"):
        del recipe["optim"][name]
    text = json.dumps(recipe, indent=2, sort_keys=True)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ConfigError(
            f"{path}: this run was started with other settings; choose a new output.path, or restore those settings"
        )
    path.write_text(text, encoding="utf-8")


def draw_curve(curve: list[dict[str, float]], folder: Path) -> None:
    """Write the learning curve to `curve.md` and `curve.png`."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = tuple(curve[0])
    lines = ["| " + " | ".join(names) + " |", "| --- " * len(names) + "|"]
    lines += ["| " + " | ".join(f"{row[name]:g}" for name in names) + " |" for row in curve]
    (folder / "curve.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    figure, axes = pyplot.subplots(figsize=(7, 4))
    # The loss of a reinforced run is that of its samples by their weights, which tells nothing. Its rewards do.
    shown = "reward" if "train_reward" in names else "loss"
    for name in (f"train_{shown}", f"validation_{shown}"):
        axes.plot([row["step"] for row in curve], [row[name] for row in curve], label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="mean reward" if shown == "reward" else "nats per token")
    axes.legend()
    figure.savefig(folder / "curve.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
