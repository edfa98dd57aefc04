"""What a format of input files must be able to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from capsfusion_ray.sources.shard import Decoded, Shard, UnreadableRange
from capsfusion_ray.storage import Store


class Format(Protocol):
    """One format. It knows tables and their columns, and no captions.

    Damage is raised as one of shard.DAMAGE by `inspect`, and returned as an UnreadableRange by `decode`.
    """

    @property
    def extensions(self) -> Sequence[str]:
        """Of file names, in lower case, without the dot."""

    @property
    def first_byte(self) -> bytes:
        """The first byte of such a file, to recognise one without an extension; empty if it may be any."""

    def inspect(self, store: Store, shard: Shard) -> Shard:
        """The shard with its rows, row_groups, schema and refused columns. Reads no more than it must."""

    def decode(
        self, store: Store, shard: Shard, ranges: Sequence[tuple[int, int]], columns: Sequence[str]
    ) -> Iterator[Decoded | UnreadableRange]:
        """The rows of the ascending `ranges` in batches, in row order, each row group decoded once. Batches may hold more rows.

        Raises FileNotFoundError if the file is gone, StorageError if the store fails.
        """
