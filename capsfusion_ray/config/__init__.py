"""What a user can set: dataclasses of keys (input, engine, gates, output, jobs), and how they are parsed (parse).

Inside the program a config is a frozen dataclass.
"""

from capsfusion_ray.config.engine import ApiConfig, DecodeConfig, EngineConfig, ResolvedDecode, VllmConfig
from capsfusion_ray.config.gates import GateConfig, GatesConfig
from capsfusion_ray.config.input import ColumnsConfig, FilterConfig, InputConfig, SourceConfig, UnitConfig
from capsfusion_ray.config.jobs import FuseConfig, PlanConfig, VerifyConfig
from capsfusion_ray.config.keys import usage
from capsfusion_ray.config.output import ClusterConfig, OutputConfig
from capsfusion_ray.config.parse import parse_config
from capsfusion_ray.config.plain import as_dict, fingerprint, read_saved, to_yaml
from capsfusion_ray.config.secrets import is_secret, without_secrets
from capsfusion_ray.config.setting import section, setting

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
    "ResolvedDecode",
    "SourceConfig",
    "UnitConfig",
    "VerifyConfig",
    "VllmConfig",
    "as_dict",
    "fingerprint",
    "is_secret",
    "parse_config",
    "read_saved",
    "section",
    "setting",
    "to_yaml",
    "usage",
    "without_secrets",
]
