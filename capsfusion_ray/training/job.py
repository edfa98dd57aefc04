"""The training loop under Ray Train: workers, restarts after a lost worker, and the learning curve. The loop knows none of this."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from capsfusion_ray.config import ClusterConfig
from capsfusion_ray.errors import ConfigError, EngineError
from capsfusion_ray.run import cluster
from capsfusion_ray.training.config import TrainConfig
from capsfusion_ray.training.loop import CURVE, fit, run_folder
from capsfusion_ray.training.triples import located


def train(cfg: TrainConfig) -> dict[str, Any]:
    """Train, or go on where a killed run stopped, and return the last row of the learning curve."""
    triples = located(cfg.data.path)
    if not cfg.output.path:
        raise ConfigError("output.path is empty; give the folder that the model is to be saved in")
    # Workers start in a folder of Ray's: relative paths must be made absolute here.
    cfg = dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, path=str(triples.resolve())),
        model=dataclasses.replace(cfg.model, path=_absolute(cfg.model.path)),
        output=dataclasses.replace(cfg.output, path=str(Path(cfg.output.path).resolve())),
    )
    work = run_folder(cfg)
    work.mkdir(parents=True, exist_ok=True)
    _refuse_another_run(cfg, work / "config.json")
    started_here = not ray.is_initialized()
    if started_here:
        cluster.connect(ClusterConfig())
    try:
        resources = {"GPU": 1.0} if cfg.cluster.gpu else {"CPU": float(cfg.cluster.threads)}
        TorchTrainer(
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
        ).fit()
    except ray.train.TrainingFailedError as error:
        raise EngineError(f"{cfg.output.path}: training failed ({error}); the same command again resumes") from error
    finally:
        if started_here:
            cluster.disconnect()
    curve = [json.loads(line) for line in (work / CURVE).read_text(encoding="utf-8").splitlines()]
    draw_curve(curve, work)
    return {"model": cfg.output.path, **curve[-1]}


def _absolute(model: str) -> str:
    """A folder's path from the root; a hub id as it is."""
    return str(Path(model).resolve()) if model and Path(model).exists() else model


def _worker(loop: dict[str, TrainConfig]) -> None:
    import ray.train.torch

    context = ray.train.get_context()
    rank = context.get_world_rank()

    def wrap(model: Any) -> Any:
        if context.get_world_size() == 1:
            return model
        # Else every gradient stands in memory twice: the parameter's own, and the bucket's that is sent around.
        return ray.train.torch.prepare_model(model, parallel_strategy_kwargs={"gradient_as_bucket_view": True})

    fit(loop["config"], lambda row: None, wrap, rank)


def _refuse_another_run(cfg: TrainConfig, path: Path) -> None:
    """A checkpoint goes on only under the recipe that began it; more steps, another cluster or wish are no other recipe."""
    recipe = dataclasses.asdict(cfg)
    del recipe["cluster"], recipe["output"]
    for name in ("steps", "decay_steps"):
        del recipe["optim"][name]
    text = json.dumps(recipe, indent=2, sort_keys=True)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ConfigError(
            f"{path}: this run began under another recipe; choose a new output.path or restore that recipe"
        )
    path.write_text(text, encoding="utf-8")


def draw_curve(curve: list[dict[str, float]], folder: Path) -> None:
    """The learning curve as `curve.md` and `curve.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = tuple(curve[0])
    lines = ["| " + " | ".join(names) + " |", "| --- " * len(names) + "|"]
    lines += ["| " + " | ".join(f"{row[name]:g}" for name in names) + " |" for row in curve]
    (folder / "curve.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    figure, axes = pyplot.subplots(figsize=(7, 4))
    # A reinforced run's loss is that of its samples by their weights and says nothing: its rewards do.
    shown = "reward" if "train_reward" in names else "loss"
    for name in (f"train_{shown}", f"validation_{shown}"):
        axes.plot([row["step"] for row in curve], [row[name] for row in curve], label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="mean reward" if shown == "reward" else "nats a token")
    axes.legend()
    figure.savefig(folder / "curve.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
