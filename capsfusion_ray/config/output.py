"""Settings of the output folder and of the actors that fill it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from capsfusion_ray.config.check import check
from capsfusion_ray.config.setting import setting


@dataclass(frozen=True)
class OutputConfig:
    """Where the dataset is, and how it is cut into files."""

    path: str = setting("", "a folder, or a URL such as s3://bucket/folder", common=True)
    target_file_mb: float = setting(256.0, "size of a data file")
    target_file_rows: int | None = setting(None, "rows of a data file; the limit that is reached first counts")
    partition_by: str = setting(
        "shard", "shard: groups of input shards; or the name of a passthrough column", common=True
    )
    max_shard_groups: int = setting(256, "most groups of input shards; each is a partition and one compaction task")
    storage: dict[str, str] = setting({}, "fsspec options, e.g. {endpoint_url: http://…}", common=True)

    def __post_init__(self) -> None:
        check(1 <= self.max_shard_groups <= 1000, "output.max_shard_groups", self.max_shard_groups, "1 to 1000")
        check(self.target_file_mb > 0, "output.target_file_mb", self.target_file_mb, "megabytes above 0")
        ok = self.target_file_rows is None or self.target_file_rows > 0
        check(ok, "output.target_file_rows", self.target_file_rows, "a positive number of rows")


@dataclass(frozen=True)
class ClusterConfig:
    """What runs the job: how many actors fuse, and what each of them takes."""

    kind: Literal["ray", "local"] = setting(
        "ray",
        "ray: a cluster, or one started here; local: one engine in this process, where a row that kills the process ends the run",
        common=True,
    )
    min_actors: int = setting(1, "the run begins when this many actors fit")
    max_actors: int | None = setting(None, "null: as many as the cluster's GPUs (or CPUs) hold", common=True)
    gpus_per_actor: float | None = setting(
        None, "null: 1 if the cluster has a GPU, else 0; a fraction shares a GPU", common=True
    )
    cpus_per_actor: float = setting(1.0, "CPU cores that Ray reserves per actor")
    units_in_flight: int = setting(2, "units per actor at the same time, so that the engine never waits for rows")
    price_per_gpu_hour: float = setting(2.5, "USD; for estimates and the report only")
    address: str = setting(
        "auto",
        "auto: the cluster of `ray job submit`, else a local one that is started here; or ray://host:10001",
        common=True,
    )

    def __post_init__(self) -> None:
        check(self.min_actors >= 1, "cluster.min_actors", self.min_actors, "at least 1")
        ok = self.max_actors is None or self.max_actors >= self.min_actors
        check(ok, "cluster.max_actors", self.max_actors, f"at least cluster.min_actors ({self.min_actors})")
        ok = self.gpus_per_actor is None or self.gpus_per_actor >= 0
        check(ok, "cluster.gpus_per_actor", self.gpus_per_actor, "0 or more")
        check(self.cpus_per_actor > 0, "cluster.cpus_per_actor", self.cpus_per_actor, "above 0")
        check(self.units_in_flight >= 1, "cluster.units_in_flight", self.units_in_flight, "at least 1")
