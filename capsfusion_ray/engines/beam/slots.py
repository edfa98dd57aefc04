"""How many captions are decoded together, and which of them side by side. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from capsfusion_ray.engines.beam.search import SearchPlan
from capsfusion_ray.engines.beam.weights import Weights

# Measured on 2 cores, float32, LLaMA 256x6 and 512x8, 3 beams: 64, 96, 128 and 192 slots, of which 96 and more are alike.
CPU_SLOTS = 96
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
    release_cached()
    free, _ = torch.cuda.mem_get_info(weights.device)
    per_row = row_bytes(weights, columns) + workspace_bytes(weights, plan, columns + prefix_tokens)
    fit = int(free * FREE_SHARE) // per_row
    most = max(1, GPU_BEAMS // plan.num_beams)
    return SlotPlan(
        max(1, min(fit, most)), f"{free / 1e9:.1f} GB free, {per_row / 1e6:.0f} MB a caption, at most {most}"
    )


def release_cached() -> None:
    """Give freed memory back to the driver: torch keeps it, and what is kept counts as used and fits nothing of another size.

    Of a 13B model that is 18 GB: the projections that `take_weights` joined, each in a piece of its own.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


LIKE = 16  # ends that differ by less are alike: a row is not moved for them


def arrange(ends: Sequence[int], live: Sequence[int], slots: int, together: int) -> list[int]:
    """A slot below `slots` for each row, so that rows side by side, `together` at a time, have like ends.

    `ends` are the columns of all rows: first of those that live in the slots `live`, then of fresh ones. A live row
    stays where it is if its slot lies among its like.
    """
    order = sorted(range(len(ends)), key=lambda row: -(ends[row] // LIKE))
    found = [-1] * len(ends)
    for first in range(0, len(ends), together):
        rows = order[first : first + together]
        room = range(first, min(first + together, slots))
        stay = {live[row]: row for row in rows if row < len(live) and live[row] in room}
        for slot, row in stay.items():
            found[row] = slot
        free = (slot for slot in room if slot not in stay)
        for row in rows:
            if found[row] < 0:
                found[row] = next(free)
    return found
