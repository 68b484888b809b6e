"""The rungs of the ladder: what one configuration becomes, from a linear probe to its own plan with experts.

    probe     the heads alone, on all tokens, reading the class tokens of the upper frozen blocks too
    late      the probe, with the last two blocks training behind them
    start     the heads alone, mild, under the configuration's own token dropping: where the next begin
    bsr       the configuration's plan without experts
    experts   the configuration's plan, with its experts

Heads that were solved begin at the blocks' own learning rate. Those of an untrained run would need
`train.head_lr_scale` times as much.
"""

from dataclasses import replace

from moe_bsr import config as configuration
from moe_bsr.config import Config
from moe_bsr.training.probe_trainer import probe_config

LATE = 2  # blocks that train in the rung of that name
LATE_RATE = 0.2  # of the configuration's learning rate: behind heads that are solved, a larger one undoes them


def probe(config: Config, depth: int, has_class_token: bool) -> Config:
    """The linear probe that a model which trains its last blocks can begin from."""
    blocks = list(range(depth // 2, max(depth // 2, depth - LATE))) if has_class_token else []
    return probe_config(configuration.replace(config, plan__drop_blocks=[], plan__keep_rate=1.0), blocks)


def with_features_of(probe: Config, late: Config) -> Config:
    """The probe by way of the features that `late` keeps."""
    data = {key: getattr(late.data, key) for key in ("feature_cache_mb", "feature_cache", "feature_cache_dir")}
    return replace(probe, data=replace(probe.data, **data))


def late(config: Config, depth: int, has_class_token: bool) -> Config:
    """The last blocks train; begins exactly as `probe` ends."""
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
        data__feature_cache_mb=None,  # of another plan's blocks; what this one keeps is the ladder's choice
        data__feature_cache="exact",
        data__feature_cache_dir=None,
    )


def start(config: Config) -> Config:
    """The heads from which the configuration's own plan begins."""
    return configuration.replace(probe_config(config, []), train__penalty="mild")


def bsr(config: Config) -> Config:
    return _from_heads(config, plan__moe_blocks=[], plan__head_blocks=[])


def experts(config: Config) -> Config:
    return _from_heads(config, plan__head_blocks=[])


def own_rungs(config: Config) -> dict[str, Config]:
    """Rungs of the configuration's own plan: none where only heads train, one where it has no experts."""
    if config.plan.train_blocks == [] and config.adapter is None:
        return {}
    return {"bsr": bsr(config)} | ({"experts": experts(config)} if config.plan.moe_blocks else {})


def _from_heads(config: Config, **changes: object) -> Config:
    return configuration.replace(config, train__head_lr_scale=1.0, **changes)
