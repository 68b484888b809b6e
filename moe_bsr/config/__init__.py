"""What a run is: typed configuration (`schema`), read strictly from YAML (`reader`)."""

from moe_bsr.config.reader import ConfigError, require
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
    dump,
    from_dict,
    is_crop_range,
    load,
    replace,
    to_dict,
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
    "dump",
    "from_dict",
    "is_crop_range",
    "load",
    "replace",
    "require",
    "to_dict",
]
