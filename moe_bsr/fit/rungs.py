"""Derive the rungs of the ladder from one configuration: its variants from a linear probe to the plan with experts.

    probe     trains only the heads, on all tokens and on the class tokens of the upper frozen blocks too
    late      continues from the probe and also trains the last two blocks
    start     trains only the heads, with a mild penalty, under the configuration's token dropping; bsr and experts
              continue from it
    bsr       the configuration's plan without experts
    experts   the configuration's plan with its experts

Heads that were solved to their optimum train at the blocks' learning rate. Only untrained heads need a rate that is
`train.head_lr_scale` times as high.
"""

from dataclasses import replace

from moe_bsr import config as configuration
from moe_bsr.config import Config
from moe_bsr.training.probe_trainer import probe_config

LATE = 2  # number of blocks that train in `late`
LATE_RATE = 0.2  # factor on the learning rate in `late`: a higher rate undoes heads that are already solved


def probe(config: Config, depth: int, has_class_token: bool) -> Config:
    """Return the linear probe. `late` can start from its weights."""
    blocks = list(range(depth // 2, max(depth // 2, depth - LATE))) if has_class_token else []
    return probe_config(configuration.replace(config, plan__drop_blocks=[], plan__keep_rate=1.0), blocks)


def with_features_of(probe: Config, late: Config) -> Config:
    """Return the probe with the feature cache of `late`, so that both share it."""
    data = {key: getattr(late.data, key) for key in ("feature_cache_mb", "feature_cache", "feature_cache_dir")}
    return replace(probe, data=replace(probe.data, **data))


def late(config: Config, depth: int, has_class_token: bool) -> Config:
    """Return the run that trains the last blocks. It starts exactly where `probe` ends."""
    heads = probe(config, depth, has_class_token).plan.head_blocks
    trained, rate = list(range(max(1, depth - LATE), depth)), LATE_RATE * config.train.lr
    return _from_heads(
        config,
        adapter=None,
        train__lr=rate,
        train__min_lr=min(config.train.min_lr, rate),
        plan__train_blocks=trained,
        plan__train_weights="all",
        plan__drop_blocks=[],
        plan__keep_rate=1.0,
        plan__moe_blocks=[],
        plan__head_blocks=heads,
        data__feature_cache_mb=None,  # the configured cache belongs to other frozen blocks; `Ladder` sets a new one
        data__feature_cache="exact",
        data__feature_cache_dir=None,
    )


def start(config: Config) -> Config:
    """Return the run that trains the heads with which the configuration's own plan starts."""
    return configuration.replace(probe_config(config, []), train__penalty="mild")


def bsr(config: Config) -> Config:
    return _from_heads(config, plan__moe_blocks=[], plan__head_blocks=[])


def experts(config: Config) -> Config:
    return _from_heads(config, plan__head_blocks=[])


def own_rungs(config: Config) -> dict[str, Config]:
    """Return the rungs of the configuration's own plan: none if only heads train, one if it has no experts."""
    if config.plan.train_blocks == [] and config.adapter is None:
        return {}
    return {"bsr": bsr(config)} | ({"experts": experts(config)} if config.plan.moe_blocks else {})


def _from_heads(config: Config, **changes: object) -> Config:
    return configuration.replace(config, train__head_lr_scale=1.0, **changes)
