"""Find input shards and read them as Arrow tables of caption pairs."""

from capsfusion_ray.sources.discover import discover, refuse_output_in_input
from capsfusion_ray.sources.filters import filter_mask
from capsfusion_ray.sources.read import iter_units, read_patiently, read_rows, sample
from capsfusion_ray.sources.schema import frozen_schema, without_foreign
from capsfusion_ray.sources.shard import ReadSpec, Shard, UnitRows, UnreadableRange

__all__ = [
    "ReadSpec",
    "Shard",
    "UnitRows",
    "UnreadableRange",
    "discover",
    "filter_mask",
    "frozen_schema",
    "iter_units",
    "read_patiently",
    "read_rows",
    "refuse_output_in_input",
    "sample",
    "without_foreign",
]
