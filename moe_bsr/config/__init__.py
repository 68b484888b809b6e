"""Typed configuration of a run (`schema`), read strictly from YAML (`yaml_text`, `reader`, `files`)."""

from moe_bsr.config.errors import ConfigError, require
from moe_bsr.config.files import as_overrides, dump, from_dict, load, override, replace, to_dict
from moe_bsr.config.schema import (
    BackboneConfig,
    Config,
    DataConfig,
    MoEConfig,
    PlanConfig,
    RuntimeConfig,
    SamplerConfig,
    TokensConfig,
    TrainConfig,
    is_crop_range,
)

__all__ = [
    "BackboneConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "MoEConfig",
    "PlanConfig",
    "RuntimeConfig",
    "SamplerConfig",
    "TokensConfig",
    "TrainConfig",
    "as_overrides",
    "dump",
    "from_dict",
    "is_crop_range",
    "load",
    "override",
    "replace",
    "require",
    "to_dict",
]
