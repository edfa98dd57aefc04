"""How many captions are decoded together (slots), and which caption gets which slot. It decodes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from capsfusion_ray.engines.beam.search import SearchPlan
from capsfusion_ray.engines.beam.weights import Weights

# Measured on 2 cores in float32 with 3 beams, LLaMA 256x6 and 512x8, with 64, 96, 128 and 192 slots: from 96 on the
# speed hardly changes.
CPU_SLOTS = 96
# An H200 is limited by computation from about 190 sequences on. 1,200 beams are far above; more of them only add
# latency and reads of keys and values.
GPU_BEAMS = 1200
FREE_SHARE = (
    0.85  # share of the memory left by the weights that slots may use; the rest is for the allocator's fragments
)
PREFILL_TOKENS = {"cpu": 512, "cuda": 8192}  # suffix tokens, with padding, per prefill


@dataclass(frozen=True)
class SlotPlan:
    """The number of rows that are decoded together, and the reason for that number (for the log)."""

    slots: int
    why: str


def row_bytes(weights: Weights, columns: int) -> int:
    """Bytes of the keys and values of one row."""
    element: int = torch.finfo(weights.dtype).bits // 8
    return 2 * len(weights.layers) * weights.kv_heads * weights.head_size * columns * element


def workspace_bytes(weights: Weights, plan: SearchPlan, columns: int) -> int:
    """Bytes that a decode step needs for one row in addition to its cache: three float32 copies of logits and of scores."""
    heads = weights.kv_heads * weights.group
    numbers_per_beam: int = weights.head.shape[0] + heads * columns
    return 3 * 4 * plan.num_beams * numbers_per_beam


def plan_slots(
    asked: int | None, weights: Weights, plan: SearchPlan, suffix_columns: int, prefix_tokens: int
) -> SlotPlan:
    """Choose the number of slots: `asked` (engine.slots) if it is set, else by the free memory of the GPU, else CPU_SLOTS."""
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
        max(1, min(fit, most)), f"{free / 1e9:.1f} GB free, {per_row / 1e6:.0f} MB per caption, at most {most}"
    )


def release_cached() -> None:
    """Give the memory that torch caches back to the GPU's driver, which otherwise counts it as used.

    For a 13B model this is 18 GB: the original projections that `take_weights` joined.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


LIKE = 16  # columns; rows whose ends differ by less count as equally long, and no row is moved for such a difference


def arrange(ends: Sequence[int], live: Sequence[int], slots: int, together: int) -> list[int]:
    """Choose a slot below `slots` for each row, so that the rows of one attention product have similar ends.

    An attention product takes `together` neighbouring slots. `ends` are the numbers of columns that rows use: first of
    the rows that are in the slots `live` now, then of the new rows. A live row keeps its slot if that slot belongs to
    the product which the row's length puts it in.
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
