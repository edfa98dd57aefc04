"""What the GPUs of one plan were expected to cost, beside what its units took: a figure of the manifest's revisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from capsfusion_ray.config import FuseConfig
from capsfusion_ray.core.accounting import UnitSummary
from capsfusion_ray.core.cost_model import Estimate
from capsfusion_ray.core.plan import Plan
from capsfusion_ray.run.pool import Pool
from capsfusion_ray.run.survey import speed


def cost(cfg: FuseConfig, pool: Pool, plan: Plan, units: Sequence[UnitSummary]) -> dict[str, Any]:
    """The estimate made from the plan, and the time that the engines worked on `units`, summed over all processes of the run.

    Neither figure holds the time to load a model and to wait for rows, so a cloud's bill is larger.
    """
    gpus, usd = pool.gpus_per_actor, cfg.cluster.price_per_gpu_hour
    device = "cuda" if gpus else "cpu"
    quote = Estimate(plan.rows, len(plan.units), pool.max_actors, speed(cfg, device), 0.0, 0.0, gpus, usd, "")
    gpu_hours = sum(unit.busy_s for unit in units) * gpus / 3600
    rows = sum(unit.fused + unit.kept + unit.rejected for unit in units)

    def figures(hours: float, captions_per_gpu_hour: float | None) -> dict[str, Any]:
        return {
            "gpu_s": round(hours * 3600, 1),
            "usd": round(hours * usd, 4),
            "captions_per_gpu_hour": captions_per_gpu_hour,
        }

    return {
        "gpus_per_actor": gpus,
        "usd_per_gpu_hour": usd,
        "estimate": figures(quote.gpu_hours, quote.captions_per_gpu_hour),
        "actual": figures(gpu_hours, round(rows / gpu_hours, 1) if gpu_hours else None),
    }
