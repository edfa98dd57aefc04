"""Keys and values: one constant prefix, and for each row a suffix and the generated slots. Nothing is ever moved for beams.

A row's columns are [suffix, right-aligned | generated slots of step 0, beam 0..K-1 | step 1, … ]. Column `suffix_columns +
t*K + k` holds the token that beam k got at step t, written once. Which columns a beam may see is a boolean row of
`visible_BKN`; a beam reorder gathers that, not keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from capsfusion_ray.engines.beam.weights import Weights


@dataclass
class Prefix:
    """Keys and values of the constant prefix, a tensor [H, P, D] for each layer."""

    ids: tuple[int, ...]
    keys: list[Tensor]
    values: list[Tensor]


@dataclass
class Cache:
    """Keys and values of B rows: for each layer [B, H, N, D]."""

    keys: list[Tensor]
    values: list[Tensor]
    visible_BKN: Tensor  # bool
    start_B: Tensor  # int64, the column of a row's first suffix token
    suffix_columns: int
    num_beams: int

    @classmethod
    def allocate(cls, rows: int, suffix_columns: int, num_beams: int, steps: int, weights: Weights) -> Cache:
        """Room for `rows` suffixes of up to `suffix_columns` tokens and `steps` generated tokens a beam."""
        columns = suffix_columns + steps * num_beams
        shape = (rows, weights.kv_heads, columns, weights.head_size)

        # Zeroed: a masked column takes part in a product with weight 0, and 0 * uninitialised NaN is NaN.
        def layers() -> list[Tensor]:
            return [torch.zeros(shape, dtype=weights.dtype, device=weights.device) for _ in weights.layers]

        return cls(
            keys=layers(),
            values=layers(),
            visible_BKN=torch.zeros(rows, num_beams, columns, dtype=torch.bool, device=weights.device),
            start_B=torch.zeros(rows, dtype=torch.int64, device=weights.device),
            suffix_columns=suffix_columns,
            num_beams=num_beams,
        )

    def open_rows(self, rows: Tensor, suffix_lengths: Tensor) -> None:
        """Rows begin: their beams see their own suffix and nothing generated."""
        start = self.suffix_columns - suffix_lengths
        columns = torch.arange(self.visible_BKN.shape[2], device=start.device)
        suffix = (columns >= start[:, None]) & (columns < self.suffix_columns)
        self.visible_BKN[rows] = suffix[:, None, :].expand(-1, self.num_beams, -1)
        self.start_B[rows] = start

    def reorder(self, rows: slice, parent_BK: Tensor) -> None:
        """Each beam of the rows goes on from its parent: it sees what its parent saw."""
        visible = self.visible_BKN[rows]
        visible.copy_(visible.gather(1, parent_BK[:, :, None].expand_as(visible)))

    def move_row(self, source: int, target: int) -> None:
        """Copy a row, so that live rows stay next to each other when a batch shrinks."""
        for tensor in (*self.keys, *self.values, self.visible_BKN, self.start_B):
            tensor[target] = tensor[source]

    def forget(self, row: int) -> None:
        """Clear a failed row: a NaN left in a masked column would reach the row's next caption."""
        for tensor in (*self.keys, *self.values):
            tensor[row] = 0
