"""Parquet files. A damaged row group costs its rows from the damaged batch on; the next row group is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pyarrow as pa

from capsfusion_ray.core.parquet import open_parquet, read_footer
from capsfusion_ray.sources.shard import BATCH_ROWS, DAMAGE, Decoded, Shard, UnreadableRange, damage_of
from capsfusion_ray.storage import Store


class ParquetFormat:
    """Reads the footer to inspect a shard, and only the wanted columns of the wanted row groups to decode it."""

    extensions = ("parquet", "pq")
    first_byte = b"P"  # of PAR1

    def inspect(self, store: Store, shard: Shard) -> Shard:
        """Two small requests, whatever the size of the file."""
        with store.open_input(shard.file) as file:
            footer = read_footer(file)
        groups = tuple(footer.metadata.row_group(g).num_rows for g in range(footer.metadata.num_row_groups))
        schema = footer.schema.remove_metadata()
        return replace(shard, rows=footer.metadata.num_rows, row_groups=groups, schema=schema, refused=footer.refused)

    def decode(
        self, store: Store, shard: Shard, ranges: Sequence[tuple[int, int]], columns: Sequence[str]
    ) -> Iterator[Decoded | UnreadableRange]:
        """See Format.decode."""
        with store.open_input(shard.file) as source:
            try:
                # Without checksums a flipped bit in an uncompressed page would be read as a caption.
                file = open_parquet(source, columns, page_checksum_verification=True)
                if [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] != list(shard.row_groups):
                    raise ValueError("its row groups are not those of the plan, so the file was replaced")
            except DAMAGE as error:
                yield UnreadableRange(0, shard.rows or 0, damage_of(error, store.url(shard.file)))
                return
            group_start = 0
            for group, group_rows in enumerate(shard.row_groups):
                start, stop = group_start, group_start + group_rows
                group_start = stop
                inside = [r for r in ranges if r[0] < stop and r[1] > start]
                if not inside:
                    continue
                at = start
                try:
                    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                        yield Decoded(at, pa.Table.from_batches([batch]))
                        at += batch.num_rows
                        if at >= inside[-1][1]:
                            break
                except DAMAGE as error:
                    yield UnreadableRange(at, stop, f"row group {group}: {damage_of(error, store.url(shard.file))}")
