"""Shards -> Arrow tables of caption pairs, a unit at a time.

| file | is |
| --- | --- |
| `model.py` | the nouns: Shard, ReadSpec, UnitRows, UnreadableRange |
| `discover.py` | paths -> shards, readable or not |
| `schema.py` | one frozen schema over all shards, and the casts to it |
| `filters.py` | which rows a filter leaves out |
| `text.py` | JSON, JSON lines, CSV and TSV as streams |
| `read.py` | row ranges of a shard -> tables |
"""

from capsfusion_ray.sources.discover import discover
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
    "sample",
    "without_foreign",
]
