"""What a user can set: the schemas (schema.py) and how they are parsed (parse.py). Inside the program there are only frozen dataclasses."""

from capsfusion_ray.config.parse import as_dict, describe, fingerprint, load, to_yaml, unwrap_optional
from capsfusion_ray.config.schema import (
    ApiConfig,
    ClusterConfig,
    ColumnsConfig,
    DecodeConfig,
    EngineConfig,
    FilterConfig,
    FuseConfig,
    GateConfig,
    GatesConfig,
    InputConfig,
    OutputConfig,
    PlanConfig,
    SourceConfig,
    UnitConfig,
    VerifyConfig,
)

__all__ = [
    "ApiConfig",
    "ClusterConfig",
    "ColumnsConfig",
    "DecodeConfig",
    "EngineConfig",
    "FilterConfig",
    "FuseConfig",
    "GateConfig",
    "GatesConfig",
    "InputConfig",
    "OutputConfig",
    "PlanConfig",
    "SourceConfig",
    "UnitConfig",
    "VerifyConfig",
    "as_dict",
    "describe",
    "fingerprint",
    "load",
    "to_yaml",
    "unwrap_optional",
]
