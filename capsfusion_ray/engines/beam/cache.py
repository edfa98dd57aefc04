"""Keys and values of the constant prefix, and for each row those of its suffix and of the tokens its beams generated.

A row's columns begin with its suffix. Each generated token is written once, into the first column that no beam of the row
sees. `visible_BKN` says which columns a beam sees. When beams are reordered, only this mask is gathered; keys and values
stay where they are. A beam that is dropped leaves columns that no beam sees, and later tokens overwrite them. So K beams
of t tokens use little more than t columns instead of K*t, because the beams of a search soon share all but their last
few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from capsfusion_ray.engines.beam.weights import Weights


@dataclass
class Prefix:
    """Keys and values of the constant prefix: one tensor [H, P, D] per layer."""

    ids: tuple[int, ...]
    keys: list[Tensor]
    values: list[Tensor]


@dataclass
class Cache:
    """Keys and values of B rows: one tensor [B, H, N, D] per layer."""

    keys: list[Tensor]
    values: list[Tensor]
    visible_BKN: Tensor  # bool
    suffix_B: Tensor  # int64, tokens of each row's suffix

    @classmethod
    def allocate(cls, rows: int, suffix_columns: int, num_beams: int, steps: int, weights: Weights) -> Cache:
        """Allocate `rows` rows for suffixes of up to `suffix_columns` tokens and `steps` generated tokens per beam."""
        columns = suffix_columns + steps * num_beams  # enough for beams that share no token
        shape = (rows, weights.kv_heads, columns, weights.head_size)

        # Zeros, because a masked column takes part in a product with weight 0, and 0 * an uninitialised NaN is NaN.
        def layers() -> list[Tensor]:
            return [torch.zeros(shape, dtype=weights.dtype, device=weights.device) for _ in weights.layers]

        return cls(
            keys=layers(),
            values=layers(),
            visible_BKN=torch.zeros(rows, num_beams, columns, dtype=torch.bool, device=weights.device),
            suffix_B=torch.zeros(rows, dtype=torch.int64, device=weights.device),
        )

    @property
    def columns(self) -> int:
        """N, the number of columns of a row."""
        columns: int = self.visible_BKN.shape[2]
        return columns

    def clear(self) -> None:
        """Make all columns invisible, as after `allocate`. Keys and values stay; they may hold anything but NaN."""
        self.visible_BKN.zero_()
        self.suffix_B.zero_()

    def open_rows(self, rows: Tensor, suffix_lengths: Tensor) -> None:
        """Start rows: their beams see their own suffix and no generated token."""
        suffix = torch.arange(self.columns, device=rows.device) < suffix_lengths[:, None]
        self.visible_BKN[rows] = suffix[:, None, :].expand(-1, self.visible_BKN.shape[1], -1)
        self.suffix_B[rows] = suffix_lengths

    def claim(self, rows: int, width: int) -> Tensor:
        """Take a free column for the next token of each beam of rows 0..B-1, and make it visible to that beam.

        Returns the columns, int64 [B, K]. Only the first `width` columns are searched; K of them must be free.
        """
        visible_BKW = self.visible_BKN[:rows, :, :width]
        free_BW = (~_seen_by_any(visible_BKW)).cumsum(dim=1, dtype=torch.int32)  # free columns up to here
        nth_BK = torch.arange(1, visible_BKW.shape[1] + 1, dtype=torch.int32, device=free_BW.device).expand(rows, -1)
        column_BK = torch.searchsorted(free_BW, nth_BK.contiguous())
        visible_BKW.scatter_(2, column_BK[:, :, None], True)
        return column_BK

    def reorder(self, parent_BK: Tensor, done_B: Tensor, width: int) -> None:
        """Each beam of rows 0..B-1 now sees what its parent saw. The beams of a row that is done see nothing."""
        visible_BKW = self.visible_BKN[: parent_BK.shape[0], :, :width]
        seen_BKW = visible_BKW.gather(1, parent_BK[:, :, None].expand_as(visible_BKW))
        torch.logical_and(seen_BKW, ~done_B[:, None, None], out=visible_BKW)

    def ends(self, rows: int, width: int) -> Tensor:
        """Return one past the last column that any beam of each of rows 0..B-1 sees; int32 [B]."""
        column_W = torch.arange(1, width + 1, dtype=torch.int32, device=self.visible_BKN.device)
        return (_seen_by_any(self.visible_BKN[:rows, :, :width]) * column_W).amax(dim=1)

    def move(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """Copy rows onto other rows, as if all at the same time. A move is (source, target, columns in use)."""
        for tensor in (*self.keys, *self.values):
            taken = [tensor[source, :, :end].clone() for source, _, end in moves]
            for (_, target, end), row in zip(moves, taken, strict=True):
                tensor[target, :, :end] = row
        sources, targets = ([move[i] for move in moves] for i in (0, 1))
        for tensor in (self.visible_BKN, self.suffix_B):
            tensor[targets] = tensor[sources]

    def clear_row(self, row: int) -> None:
        """Clear a failed row. A NaN left in a masked column would reach the row's next caption."""
        for tensor in (*self.keys, *self.values):
            tensor[row] = 0


def write_columns(
    key_BKHD: Tensor, value_BKHD: Tensor, column_BK: Tensor, keys_BHND: Tensor, values_BHND: Tensor
) -> None:
    """Write the key and the value of one token per beam into its column, in the first B rows of whole cache tensors."""
    row_B1 = torch.arange(len(column_BK), device=column_BK.device)[:, None]
    keys_BHND[row_B1, :, column_BK] = key_BKHD
    values_BHND[row_B1, :, column_BK] = value_BKHD


def _seen_by_any(visible_BKW: Tensor) -> Tensor:
    """Return which columns at least one beam of the row sees; bool [B, W]. On a CPU ten times as fast as any(dim=1)."""
    return reduce(torch.logical_or, visible_BKW.unbind(1))
