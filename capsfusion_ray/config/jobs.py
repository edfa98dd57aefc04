"""The settings of the jobs fuse, plan and verify. The other jobs declare theirs in their own files."""

from __future__ import annotations

from dataclasses import dataclass

from capsfusion_ray.config.check import check
from capsfusion_ray.config.engine import DecodeConfig, EngineConfig
from capsfusion_ray.config.gates import GatesConfig
from capsfusion_ray.config.input import FilterConfig, InputConfig, SourceConfig, UnitConfig
from capsfusion_ray.config.output import ClusterConfig, OutputConfig
from capsfusion_ray.config.setting import section, setting


@dataclass(frozen=True)
class FuseConfig:
    """The fuse job. Units of measure are in the names: `_s` seconds, `_mb` 1e6 bytes, `_tokens`, `_rows`."""

    input: InputConfig = section(InputConfig, required=["path"])
    source: SourceConfig = section(SourceConfig)
    filter: FilterConfig = section(FilterConfig)
    unit: UnitConfig = section(UnitConfig)
    engine: EngineConfig = section(EngineConfig)
    decode: DecodeConfig = section(DecodeConfig)
    gates: GatesConfig = section(GatesConfig)
    output: OutputConfig = section(OutputConfig, required=["path"])
    cluster: ClusterConfig = section(ClusterConfig)
    retry: str = setting(
        "",
        "fuse rejected rows of a finished output again with these settings: `rejected`, or reasons separated by commas",
        common=True,
    )
    repair: bool = setting(False, "recompute the units of damaged or missing files of a finished output", common=True)
    takeover: bool = setting(False, "stop another driver that fuses into the same output, and continue in its place")
    lease_wait_s: float = setting(
        0.0, "wait this long for such a driver to end; 0: refuse at once. For clusters whose attempts may overlap"
    )

    def __post_init__(self) -> None:
        check(not (self.retry and self.repair), "repair", self.repair, "false beside retry: give one, then the other")


@dataclass(frozen=True)
class PlanConfig(FuseConfig):
    """The plan job: the settings of a fuse run. It computes the same plan and writes nothing."""

    calibrate: bool = setting(
        False, "measure one actor on a few hundred rows of the input instead of guessing its speed", common=True
    )
    preempted_every_h: float | None = setting(
        None, "spot nodes: mean hours that an actor lives; null: no actor is preempted"
    )
    restart_s: float = setting(
        300.0, "spot nodes: seconds from an actor's death to the first caption of its successor: node, model and engine"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = self.preempted_every_h is None or self.preempted_every_h > 0
        check(ok, "preempted_every_h", self.preempted_every_h, "null, or above 0")
        check(self.restart_s >= 0, "restart_s", self.restart_s, "0 or more")


@dataclass(frozen=True)
class VerifyConfig:
    """The verify job."""

    output: OutputConfig = section(OutputConfig, required=["path"])
    deep: bool = setting(
        False, "also read every row id back, and check that each is in its unit, in order, once", common=True
    )
