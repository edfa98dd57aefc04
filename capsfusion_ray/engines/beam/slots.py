"""How many captions are decoded together: from the config, or from free memory. Pure arithmetic over a model's sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from capsfusion_ray.engines.beam.search import SearchPlan
from capsfusion_ray.engines.beam.weights import Weights

# Measured on 2 cores, float32, LLaMA 256x6 and 512x8, 3 beams: see benchmarks/.
CPU_SLOTS = 32
# 1,200 beams: past the ridge of an H200 (about 190 sequences) by far; more only adds latency and KV reads.
GPU_BEAMS = 1200
FREE_SHARE = 0.85  # of the memory that is free once the weights are there; the rest is for the allocator's fragments
PREFILL_TOKENS = {"cpu": 512, "cuda": 8192}  # padded suffix tokens of one prefill


@dataclass(frozen=True)
class SlotPlan:
    """Rows decoded together, and why that many."""

    slots: int
    why: str


def row_bytes(weights: Weights, columns: int) -> int:
    """Keys and values of one row."""
    element: int = torch.finfo(weights.dtype).bits // 8
    return 2 * len(weights.layers) * weights.kv_heads * weights.head_size * columns * element


def workspace_bytes(weights: Weights, plan: SearchPlan, columns: int) -> int:
    """What a decode step needs for one row beside its cache: three float32 tensors each of logits and of scores."""
    heads = weights.kv_heads * weights.group
    columns_in_all: int = weights.head.shape[0] + heads * columns
    return 3 * 4 * plan.num_beams * columns_in_all


def plan_slots(
    asked: int | None, weights: Weights, plan: SearchPlan, suffix_columns: int, prefix_tokens: int
) -> SlotPlan:
    """Slots from `engine.slots`, else from free memory on a GPU, else CPU_SLOTS."""
    if asked is not None:
        return SlotPlan(asked, "engine.slots")
    if weights.device.type != "cuda":
        return SlotPlan(CPU_SLOTS, "the CPU default")
    columns = suffix_columns + plan.max_new_tokens * plan.num_beams
    free, _ = torch.cuda.mem_get_info(weights.device)
    per_row = row_bytes(weights, columns) + workspace_bytes(weights, plan, columns + prefix_tokens)
    fit = int(free * FREE_SHARE) // per_row
    most = max(1, GPU_BEAMS // plan.num_beams)
    return SlotPlan(
        max(1, min(fit, most)), f"{free / 1e9:.1f} GB free, {per_row / 1e6:.0f} MB a caption, at most {most}"
    )
