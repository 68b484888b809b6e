"""List the plans of a backbone that fit into a memory: trained blocks, token dropping, experts, storage.

Costs are predicted, except for the memory of this process with its libraries and the block times of `Rates`, which are
measured. Accuracy is unknown. The list is therefore the Pareto front of the known quantities: seconds, memory, number
of trained weights, and patches that the last block sees.
"""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from moe_bsr import config as configuration
from moe_bsr.config import Config, ConfigError, require
from moe_bsr.cost.least import least_beside_gradients
from moe_bsr.cost.predict import Cost, evaluation_peak, predict
from moe_bsr.fit.memory_limit import MICRO_BATCHES, SPARE, STORAGES
from moe_bsr.fit.rates import Rates
from moe_bsr.model.backbones import family_of, require_tokens
from moe_bsr.model.block import contexts
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.plan import make_plan
from moe_bsr.model.summary import counts
from moe_bsr.runtime import memory
from moe_bsr.runtime.device import Runtime

MOST = 15  # plans in the list
NEARER = 0.05  # step by which the tolerance of the comparison grows while the front has more than `MOST` plans
LEAST_IMAGES = 4  # per micro-batch. Smaller ones cost more time than leaner storages.
FULL = {"moe.experts": "full", "moe.gate": "token"}
EXPERTS = ({"moe.experts": "low_rank"}, FULL | {"moe.mlp_ratio": 4}, FULL | {"moe.mlp_ratio": 1})
MOST_WITH_EXPERTS = 3  # largest number of trained blocks for which variants with experts are tried
PLAIN = {
    "plan.moe_blocks": [],
    "data.feature_cache_mb": None,  # the configured cache belongs to another plan's frozen blocks
    "data.feature_cache": "exact",
    "data.feature_cache_dir": None,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan in its fastest form that fits.

    Attributes:
        changes: to the configuration, by key.
        bytes: peak of the whole process, without decoded images.
        flops: FLOPs of an update. seconds: time of an update; None without timing.
        trained: number of trained weights. patches: share of the image's patches that the last block sees.
    """

    changes: dict[str, Any]
    bytes: int
    flops: int
    seconds: float | None
    trained: int
    patches: float

    @property
    def costs(self) -> tuple[float, ...]:
        """The quantities by which plans are compared. Smaller is better for each."""
        return self.seconds or self.flops, self.bytes, 1 / self.trained, 1 / self.patches


class Catalog:
    """Search for the plans of one backbone and some tasks that fit into a memory.

    Attributes:
        base: bytes of the process without a model.
        least: bytes of the leanest plan; None before `plans` has run.
    """

    def __init__(self, config: Config, classes: dict[str, int], limit: int, runtime: Runtime, timed: bool) -> None:
        """Make a catalog.

        Args:
            limit: bytes for the whole process. timed: whether to time blocks on this machine.

        Raises:
            ConfigError: the optimizer cannot train blocks, or the backbone has no tokens.
        """
        require(config.train.optimizer != "lbfgs", "train.optimizer", "lbfgs", "adamw, adamw8 or sgd: blocks train")
        require_tokens(config.backbone, "a list of plans")
        self.config, self.classes, self.limit, self.precision = config, classes, limit, runtime.precision
        self.base = 0 if runtime.device.type == "cuda" else memory.resident() + SPARE
        self.vit = family_of(config.backbone).create_on_meta(config.backbone)
        self.rates = Rates(config, classes, self.vit, runtime) if timed else None
        self.least: int | None = None
        self._models: dict[str, MultitaskViT] = {}

    def plans(self) -> list[Plan]:
        """Return all plans that fit."""
        # Plans that train only heads come first. Once `least` is small, a lower bound suffices to reject most others.
        looked = sorted(candidates(self.config, self.vit), key=lambda changes: bool(changes["plan.train_blocks"]))
        forms = (self._fastest(changes) for changes in looked)
        return [plan for plan in forms if plan is not None]

    def _fastest(self, changes: dict[str, Any]) -> Plan | None:
        """Return the plan's fastest form that fits, or None.

        With adamw, 8-bit moments are also tried, unless the plan fits with exact storage and without micro-batches.
        """
        found = []
        for optimizer in ("adamw", "adamw8") if self.config.train.optimizer == "adamw" else (None,):
            own = changes if optimizer is None else changes | {"train.optimizer": optimizer}
            if (form := self._first_that_fits(own)) is not None:
                found.append(form)
                if form.changes["storage"] == "exact" and form.changes["train.grad_accumulation_steps"] == 1:
                    break
        return min(found, key=lambda plan: plan.costs, default=None)

    def _first_that_fits(self, changes: dict[str, Any]) -> Plan | None:
        """Return the first form that fits: storages from fastest to leanest, each in ever more micro-batches."""
        batch, beside, evaluation = self.config.train.batch_size, 0, None
        for storage in STORAGES:
            parts = 1
            while parts in MICRO_BATCHES and batch % parts == 0 and (parts == 1 or batch // parts >= LEAST_IMAGES):
                form = changes | {"storage": storage, "train.grad_accumulation_steps": parts}
                try:
                    config, model = self._configured(form)
                    if evaluation is None:
                        evaluation = evaluation_peak(model, config, self.precision)
                    if parts > 1 and self._is_too_much(config, model, beside):
                        parts *= 2
                        continue
                    cost = self._cost(config, model, batch // parts)
                except ConfigError:  # impossible for this backbone, or with this many micro-batches
                    break
                always = self.base + cost.parameters + cost.optimizer + cost.average
                needed = max(self.base + cost.peak, always + evaluation)
                self.least = min(needed, self.least or needed)
                if needed <= self.limit:
                    return self._plan(form, config, model, cost, needed)
                beside = always + cost.gradients
                available = self.limit - beside
                if available <= 0 or always + evaluation > self.limit:
                    return None  # no form fits
                wanted = parts * (needed - beside) / available  # a step's activations shrink with its images
                parts *= 2
                while parts < wanted:
                    parts *= 2
        return None

    def _plan(self, changes: dict[str, Any], config: Config, model: MultitaskViT, cost: Cost, needed: int) -> Plan:
        parts = config.train.grad_accumulation_steps
        tasks = len(model.trained_tasks) if config.sampler.kind == "joint" else 1
        images = min(config.data.image_cache_mb, (self.limit - needed) // 2 // 10**6)
        return Plan(
            changes | {"data.image_cache_mb": images},
            needed,
            tasks * parts * cost.step_flops,
            self.rates and self.rates.seconds(config, model),
            sum(p.numel() for p in model.parameters() if p.requires_grad),
            (counts(model)[-1][0] - self.vit.num_prefix_tokens) / self.vit.patch_embed.num_patches,
        )

    def _is_too_much(self, config: Config, model: MultitaskViT, beside: int) -> bool:
        """Whether a lower bound shows that a form with several micro-batches neither fits nor is the leanest so far.

        Args:
            beside: bytes of the process, weights, optimizer state and gradients.
        """
        images = config.train.batch_size // config.train.grad_accumulation_steps
        least = least_beside_gradients(model, config, batch=images, precision=self.precision)
        return beside + least > max(self.limit, self.least or 0)

    def _configured(self, changes: dict[str, Any]) -> tuple[Config, MultitaskViT]:
        config = configuration.replace(self.config, **changes)
        return config, self._model(config)

    def _cost(self, config: Config, model: MultitaskViT, images: int) -> Cost:
        return predict(model, config, batch=images, precision=self.precision, all_tasks=True)

    def _model(self, config: Config) -> MultitaskViT:
        """Return the model of a configuration. One model serves all that differ only in dropping and storage."""
        key = repr((config.plan.train_blocks, config.plan.moe_blocks, config.moe))
        if key not in self._models:
            self._models[key] = MultitaskViT(copy.deepcopy(self.vit), config, self.classes)
        model = self._models[key]
        model.plan = make_plan(config, len(self.vit.blocks))
        model.contexts = contexts(model.vit, model.plan, config.tokens)
        return model


def candidates(config: Config, vit: VisionTransformer) -> Iterator[dict[str, Any]]:
    """Yield the changes to the configuration, by key, for every plan to consider. Its own plan comes first."""
    depth, plan = len(vit.blocks), config.plan
    late = [list(range(depth - count, depth)) for count in (0, 2, depth // 3)]
    thirds = [depth * part // 3 - 1 for part in (1, 2, 3)]  # 3, 7, 11 at depth 12
    early = [depth * part // 4 - depth // 6 for part in (1, 2, 3)]  # 1, 4, 7 at depth 12
    trained = [*late, thirds, "all", plan.train_blocks]
    drops = [([], 1.0), (early, 0.66), (plan.drop_blocks, plan.keep_rate)]
    own = _dropping(plan.drop_blocks, plan.keep_rate) | {"plan.train_blocks": plan.train_blocks}
    experts = {key: getattr(config.moe, key.removeprefix("moe.")) for key in EXPERTS[1]}  # defaults of a plan
    first = PLAIN | own | {"plan.moe_blocks": plan.moe_blocks}
    seen = [experts | first]
    yield first
    for blocks, (places, rates) in itertools.product(trained, drops):
        bare = PLAIN | {"plan.train_blocks": blocks, **_dropping(places, rates)}
        few = blocks and blocks != "all" and len(blocks) <= MOST_WITH_EXPERTS
        with_experts = [bare | {"plan.moe_blocks": blocks} | kind for kind in EXPERTS] if few else []
        for changes in (bare, *with_experts):
            if experts | changes not in seen:
                seen.append(experts | changes)
                yield changes


def _dropping(blocks: list[int], rates: float | list[float]) -> dict[str, Any]:
    return {"plan.drop_blocks": blocks, "plan.keep_rate": rates}


def front(plans: list[Plan], most: int = MOST) -> tuple[list[Plan], float]:
    """Return the Pareto front of the plans, the fastest first.

    Returns:
        The plans, and the relative tolerance within which costs count as equal: the smallest that leaves at most
        `most` plans.
    """
    ordered, near = sorted(plans, key=lambda plan: plan.costs), 0.0
    while True:
        kept: list[Plan] = []
        for plan in ordered:
            if not any(_as_good(other, plan, near) for other in kept):
                kept.append(plan)
        if len(kept) <= most:
            return kept, near
        near += NEARER


def _as_good(one: Plan, other: Plan, near: float) -> bool:
    return all(a <= (1 + near) * b for a, b in zip(one.costs, other.costs, strict=True))
