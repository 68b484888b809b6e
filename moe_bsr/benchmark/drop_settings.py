"""Settings of token dropping and merging, and the features that they give for the same images.

Settings that agree up to some block have the same tokens there. The blocks before their first difference are therefore
computed once for both.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from moe_bsr.config import Config, TokensConfig, as_overrides
from moe_bsr.model import block
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.plan import token_counts
from moe_bsr.model.replay import Replay
from moe_bsr.model.tokens import Tokens

KEYS = ("reduce", "fuse", "protect_fused", "rank_by")  # options in `tokens` that change which tokens are left
MOST_MERGED = 0.5  # the smallest keep rate that merging allows


@dataclass(frozen=True)
class DropSetting:
    """Where, how many and how tokens are dropped or merged.

    Attributes:
        rates: (block, keep rate) by ascending block; () drops nothing.
    """

    rates: tuple[tuple[int, float], ...] = ()
    tokens: TokensConfig = field(default_factory=TokensConfig, hash=False)

    def __str__(self) -> str:
        if not self.rates:
            return "none"
        shares = list(dict.fromkeys(f"{rate:g}" for _, rate in self.rates))
        if len(shares) > 1:
            shares = [f"{rate:g}" for _, rate in self.rates]
        places = f"keep {','.join(shares)} at {','.join(str(at) for at, _ in self.rates)}"
        return " ".join([places, *as_overrides(self._changed())])

    def at(self, index: int) -> float:
        """Return the keep rate of a block; 1 if it drops nothing."""
        return dict(self.rates).get(index, 1.0)

    def overrides(self) -> list[str]:
        """Return the setting as key=value overrides of a configuration."""
        blocks, rates = [at for at, _ in self.rates], [rate for _, rate in self.rates]
        keep = rates if len(set(rates)) > 1 else rates[0] if rates else 0.5
        tokens = {f"tokens.{key}": value for key, value in self._changed().items()}
        return as_overrides({"plan.drop_blocks": blocks, "plan.keep_rate": keep} | tokens)

    def _changed(self) -> dict[str, Any]:
        """Return the keys of `tokens` that differ from their defaults."""
        usual, own = TokensConfig(), {key: getattr(self.tokens, key) for key in KEYS}
        return {key: value for key, value in own.items() if value != getattr(usual, key)}


def setting_of(config: Config) -> DropSetting:
    """Return the drop setting of a configuration."""
    return DropSetting(tuple(sorted(config.plan.keep_rates.items())), config.tokens)


def features_of_settings(model: MultitaskViT, images: Tensor, settings: list[DropSetting]) -> dict[DropSetting, Tensor]:
    """Compute the frozen backbone's features under each setting: (B, D) float32.

    Args:
        model: dense, with every block frozen and nothing dropped, in evaluation mode.
        images: (B, 3, S, S), normalized.
    """
    tokens, _ = model.forward_features(images, upto=0)
    return dict(_walk(model, tokens, 0, settings))


def _walk(
    model: MultitaskViT, tokens: Tokens, index: int, settings: list[DropSetting]
) -> Iterator[tuple[DropSetting, Tensor]]:
    """Yield the features of settings that share the tokens entering block `index`."""
    if index == len(model.plan):
        features = model.features(tokens)
        yield from ((setting, features) for setting in settings)
        return
    groups: dict[tuple, list[DropSetting]] = {}
    for setting in settings:
        begun = any(at <= index for at, _ in setting.rates)  # before its first drop, the way of dropping is irrelevant
        groups.setdefault((setting.at(index), repr(setting.tokens) if begun else ""), []).append(setting)
    for members in groups.values():
        rate, how = members[0].at(index), members[0].tokens
        context = model.contexts[index]
        context = replace(context, plan=replace(context.plan, keep_rate=rate), tokens=how)
        after, _ = block.forward(model.vit.blocks[index], tokens, context, "", Replay())
        model.collect_class_token(index, tokens, after)
        yield from _walk(model, after, index + 1, members)


def relative_flops(model: MultitaskViT, setting: DropSetting) -> float:
    """Return the FLOPs of the blocks relative to those with all tokens. Norms and softmax are left out."""
    return _block_flops(model, setting) / _block_flops(model, DropSetting())


def _block_flops(model: MultitaskViT, setting: DropSetting) -> float:
    vit, how = model.vit, setting.tokens
    plan = [replace(row, keep_rate=setting.at(index)) for index, row in enumerate(model.plan)]
    first = vit.patch_embed.num_patches + vit.num_prefix_tokens
    counts = token_counts(plan, first, vit.num_prefix_tokens, how.fuses, how.protect_fused)
    total = 0.0
    for layer, context, (entering, leaving) in zip(vit.blocks, model.contexts, counts, strict=True):
        queries = 1 if context.class_token_alone else entering
        leaving = 1 if context.class_token_alone else leaving
        pairs = 2 * queries * entering * vit.embed_dim  # queries with keys, and weights with values
        keys_values = 2 * layer.attn.qkv.weight.numel() // 3
        projections = entering * keys_values + queries * (_matrices(layer.attn) - keys_values)
        total += 2 * (projections + pairs + leaving * _matrices(layer.mlp))
    return total


def _matrices(layer: nn.Module) -> int:
    """Return the multiply-adds per token of a layer's matrices."""
    return sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim == 2)


def equal_flops(
    model: MultitaskViT, target: float, at_rate: Callable[[float], DropSetting], low: float = 0.02
) -> DropSetting | None:
    """Return the most expensive setting `at_rate(rate)` with relative FLOPs of at most `target`; None if there is none.

    Args:
        at_rate: makes a setting from a keep rate in (0, 1); FLOPs increase with the rate.
        low: the smallest rate to consider.
    """
    if relative_flops(model, at_rate(low)) > target:
        return None
    high = 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if relative_flops(model, at_rate(middle)) <= target else (low, middle)
    return at_rate(math.floor(1000 * low) / 1000)


def candidates(model: MultitaskViT, own: DropSetting) -> list[DropSetting]:
    """Return the settings to compare with `own`.

    These are no dropping, `own` and milder versions of it, other ways to fuse and rank, merging, and other blocks with
    equal FLOPs.
    """
    depth, blocks = len(model.plan), [at for at, _ in own.rates]
    how, target = own.tokens, relative_flops(model, own)

    def everywhere(places: Iterable[int], rate: float) -> DropSetting:
        return DropSetting(tuple((place, rate) for place in places), how)

    found = [DropSetting(), own]
    least = MOST_MERGED if how.merges else 0.02
    if blocks:
        found += [everywhere(blocks, (1 + own.rates[0][1]) / 2), DropSetting(own.rates[1:], how)]
        ways = [{"fuse": fuse} for fuse in ("raw", "normalized", "none")]
        ways.append({"fuse": "normalized", "protect_fused": True})
        found += [DropSetting(own.rates, TokensConfig(rank_by=how.rank_by, **way)) for way in ways]
        if not how.merges:
            other = "logits" if how.rank_by == "probabilities" else "probabilities"
            found.append(DropSetting(own.rates, replace(how, rank_by=other)))
        if all(rate >= MOST_MERGED for _, rate in own.rates):
            found.append(DropSetting(own.rates, TokensConfig(reduce="merge")))
        strides = (1, 2, 3, 4, depth)  # `depth` gives a single drop
        places = [range(first, depth - 1, stride) for first in range(depth // 3) for stride in strides]
        places = [each for each in places if list(each) != blocks]
        equal = (equal_flops(model, target, lambda rate, at=at: everywhere(at, rate), least) for at in places)
        found += [setting for setting in equal if setting is not None]
    return list({str(setting): setting for setting in found}.values())
