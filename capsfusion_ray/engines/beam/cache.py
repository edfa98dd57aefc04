"""Keys and values: one constant prefix, and for each row its suffix and the tokens its beams generated.

A row's columns begin with its suffix. Each generated token is written once, into the first column that no beam of the row
sees. Which columns a beam sees is a boolean row of `visible_BKN`; a beam reorder gathers that, not keys and values. Beams
that are given up leave columns that nobody sees, and these are written again: K beams of t tokens use not K*t columns but
little more than t, since the beams of a search soon share all but their last few tokens.
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
    suffix_B: Tensor  # int64, tokens of each row's suffix

    @classmethod
    def allocate(cls, rows: int, suffix_columns: int, num_beams: int, steps: int, weights: Weights) -> Cache:
        """Room for `rows` suffixes of up to `suffix_columns` tokens and `steps` generated tokens a beam."""
        columns = suffix_columns + steps * num_beams  # beams that never share a token
        shape = (rows, weights.kv_heads, columns, weights.head_size)

        # Zeroed: a masked column takes part in a product with weight 0, and 0 * uninitialised NaN is NaN.
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
        """Columns of a row."""
        columns: int = self.visible_BKN.shape[2]
        return columns

    def clear(self) -> None:
        """No row sees anything: as it was allocated, whatever keys and values it holds."""
        self.visible_BKN.zero_()
        self.suffix_B.zero_()

    def open_rows(self, rows: Tensor, suffix_lengths: Tensor) -> None:
        """Rows begin: their beams see their own suffix and nothing generated."""
        suffix = torch.arange(self.columns, device=rows.device) < suffix_lengths[:, None]
        self.visible_BKN[rows] = suffix[:, None, :].expand(-1, self.visible_BKN.shape[1], -1)
        self.suffix_B[rows] = suffix_lengths

    def claim(self, rows: int, width: int) -> Tensor:
        """A free column for the next token of each beam of rows 0..B-1, which that beam sees from now on; int64 [B, K].

        Looks at the first `width` columns, of which K must be free.
        """
        visible_BKW = self.visible_BKN[:rows, :, :width]
        free_BW = (~_seen_by_any(visible_BKW)).cumsum(dim=1, dtype=torch.int32)  # free columns up to here
        nth_BK = torch.arange(1, visible_BKW.shape[1] + 1, dtype=torch.int32, device=free_BW.device).expand(rows, -1)
        column_BK = torch.searchsorted(free_BW, nth_BK.contiguous())
        visible_BKW.scatter_(2, column_BK[:, :, None], True)
        return column_BK

    def reorder(self, parent_BK: Tensor, done_B: Tensor, width: int) -> None:
        """Each beam of rows 0..B-1 goes on from its parent: it sees what its parent saw; of a row that is done, nothing."""
        visible_BKW = self.visible_BKN[: parent_BK.shape[0], :, :width]
        seen_BKW = visible_BKW.gather(1, parent_BK[:, :, None].expand_as(visible_BKW))
        torch.logical_and(seen_BKW, ~done_B[:, None, None], out=visible_BKW)

    def ends(self, rows: int, width: int) -> Tensor:
        """One past the last column that rows 0..B-1 see; int32 [B]."""
        column_W = torch.arange(1, width + 1, dtype=torch.int32, device=self.visible_BKN.device)
        return (_seen_by_any(self.visible_BKN[:rows, :, :width]) * column_W).amax(dim=1)

    def move(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """Copy rows onto others, all at once: (source, target, columns in use)."""
        for tensor in (*self.keys, *self.values):
            taken = [tensor[source, :, :end].clone() for source, _, end in moves]
            for (_, target, end), row in zip(moves, taken, strict=True):
                tensor[target, :, :end] = row
        sources, targets = ([move[i] for move in moves] for i in (0, 1))
        for tensor in (self.visible_BKN, self.suffix_B):
            tensor[targets] = tensor[sources]

    def forget(self, row: int) -> None:
        """Clear a failed row: a NaN left in a masked column would reach the row's next caption."""
        for tensor in (*self.keys, *self.values):
            tensor[row] = 0


def write_columns(
    key_BKHD: Tensor, value_BKHD: Tensor, column_BK: Tensor, keys_BHND: Tensor, values_BHND: Tensor
) -> None:
    """Write one token's key and value of each beam into its column; the first B rows of whole cache tensors."""
    row_B1 = torch.arange(len(column_BK), device=column_BK.device)[:, None]
    keys_BHND[row_B1, :, column_BK] = key_BKHD
    values_BHND[row_B1, :, column_BK] = value_BKHD


def _seen_by_any(visible_BKW: Tensor) -> Tensor:
    """Which columns some beam of the row sees; bool [B, W]. Ten times as fast as any(dim=1) on a CPU."""
    return reduce(torch.logical_or, visible_BKW.unbind(1))
