"""Where an output keeps its plans: `_run/plan-r001.parquet` and one more for every revision, each written once."""

from __future__ import annotations

from capsfusion_ray.core.plan import Plan
from capsfusion_ray.storage import Store

RUN_DIR = "_run"


def plan_path(revision: int) -> str:
    return f"{RUN_DIR}/plan-r{revision:03d}.parquet"


def config_path(revision: int) -> str:
    """The settings that a revision was planned under, secrets masked."""
    return f"{RUN_DIR}/config-r{revision:03d}.yaml"


def read_plans(store: Store) -> list[Plan]:
    """All revisions, oldest first; empty for a fresh output."""
    found = [file.path for file in store.list(RUN_DIR) if file.path.startswith(f"{RUN_DIR}/plan-")]
    return [Plan.from_bytes(store.get(path)) for path in found]


def write_plan(store: Store, plan: Plan) -> bool:
    """False: another driver planned this revision first."""
    return store.put_if_absent(plan_path(plan.number), plan.to_bytes())
