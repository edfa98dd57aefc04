"""Read and write the plans of an output: `_run/plan-r001.parquet` and one more per extension, each written once."""

from __future__ import annotations

from capsfusion_ray.core.plan import Plan
from capsfusion_ray.dataset.layout import PLAN_PREFIX, RUN_DIR, plan_path
from capsfusion_ray.storage import Store


def read_plans(store: Store) -> list[Plan]:
    """All plans of an output, in order of their numbers; empty for a fresh output."""
    found = [file.path for file in store.list(RUN_DIR) if file.path.startswith(PLAN_PREFIX)]
    return [Plan.from_bytes(store.get(path)) for path in found]


def write_plan(store: Store, plan: Plan) -> bool:
    """Write a plan if no plan has its number. False: another driver wrote a plan with this number before."""
    return store.put_if_absent(plan_path(plan.number), plan.to_bytes())
