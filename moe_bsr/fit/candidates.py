"""Derive the candidates of `fit` from one configuration: its variants from a linear probe to the plan with experts.

    probe     trains only the heads, on all tokens
    late      also trains the last two blocks
    bsr       the configuration's plan without experts
    experts   the configuration's plan with its experts

All others continue from the probe. Heads read the class tokens of the upper blocks too (`head_blocks`), so little is
lost when a plan starts to drop tokens. Heads that were solved to their optimum train at the blocks' learning rate, and
that is `RATE` of the configured one: a higher rate undoes what the heads have. Only untrained heads need a rate that is
`train.head_lr_scale` times as high.
"""

from collections.abc import Iterable
from dataclasses import replace

from moe_bsr import config as configuration
from moe_bsr.config import Config
from moe_bsr.config.probe import probe_config

LATE = 2  # number of blocks that train in `late`
RATE = 1 / 15  # factor on the learning rate of all candidates that train blocks


def head_blocks(config: Config, depth: int, has_class_token: bool) -> list[int]:
    """Return the blocks whose class tokens heads read besides the output: those of the configuration, or else the upper
    half of the network."""
    return config.plan.head_blocks or (list(range(depth // 2, depth - 1)) if has_class_token else [])


def probe(config: Config, heads: Iterable[int]) -> Config:
    """Return the linear probe.

    Args:
        heads: the blocks whose class tokens the heads read, in this function and all others.
    """
    return probe_config(configuration.replace(config, plan__drop_blocks=[], plan__keep_rate=1.0), heads)


def with_features_of(probe: Config, late: Config) -> Config:
    """Return the probe with the feature cache of `late`, so that both share it."""
    data = {key: getattr(late.data, key) for key in ("feature_cache_mb", "feature_cache", "feature_cache_dir")}
    return replace(probe, data=replace(probe.data, **data))


def late(config: Config, depth: int, heads: Iterable[int]) -> Config:
    """Return the run that trains the last blocks. It begins with the predictions of `probe`."""
    return _continued(
        config,
        heads,
        adapter=None,
        train__alast__blocks=None,  # ALaST draws from all blocks
        plan__train_blocks=list(range(max(1, depth - LATE), depth)),
        plan__train_weights="all",
        plan__drop_blocks=[],
        plan__keep_rate=1.0,
        plan__moe_blocks=[],
        data__feature_cache_mb=None,  # the configured cache belongs to other frozen blocks; `Search` sets a new one
        data__feature_cache="exact",
        data__feature_cache_dir=None,
    )


def own_candidates(config: Config, heads: Iterable[int]) -> dict[str, Config]:
    """Return the candidates of the configuration's own plan: none if only heads train, one if it has no experts."""
    if config.plan.train_blocks == [] and config.adapter is None:
        return {}
    experts = {"experts": _continued(config, heads)} if config.plan.moe_blocks else {}
    return {"bsr": _continued(config, heads, plan__moe_blocks=[])} | experts


def _continued(config: Config, heads: Iterable[int], **changes: object) -> Config:
    """Return the configuration of a run that continues from the probe."""
    rate = RATE * config.train.lr
    settings = {"head_lr_scale": 1.0, "lr": rate, "min_lr": min(config.train.min_lr, rate)}
    own = {f"train__{key}": value for key, value in settings.items()} | {"plan__head_blocks": list(heads)}
    return configuration.replace(config, **own | changes)
