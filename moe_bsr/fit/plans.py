"""Which plans of a backbone fit into a memory: what trains, where tokens are dropped, which experts, in which form.

Everything is predicted but the memory of this process with its libraries, which is measured, and the rates of `Rates`.
Nothing is known of accuracy. So a plan is worth telling if no other is as good in all that is known: seconds, memory,
weights that train, patches that the last block sees.
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
from moe_bsr.cost.predict import Cost, predict
from moe_bsr.fit.rates import Rates
from moe_bsr.fit.room import MICRO_BATCHES, SPARE, STORAGES
from moe_bsr.model.backbones import family_of, require_tokens
from moe_bsr.model.block import contexts
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.plan import make_plan, token_counts
from moe_bsr.runtime import memory
from moe_bsr.runtime.device import Runtime
from moe_bsr.training.trainer import BATCH

MOST = 15  # plans that are told
NEARER = 0.05  # step of the share within which two plans are taken for alike, where there are more
LEAST_IMAGES = 4  # of a micro-batch; smaller ones waste more time than leaner storages
FULL = {"moe.experts": "full", "moe.gate": "token"}
EXPERTS = ({"moe.experts": "low_rank"}, FULL | {"moe.mlp_ratio": 4}, FULL | {"moe.mlp_ratio": 1})
MOST_WITH_EXPERTS = 3  # blocks
PLAIN = {
    "plan.moe_blocks": [],
    "plan.head_blocks": [],
    "data.feature_cache_mb": None,  # of another plan's frozen blocks
    "data.feature_cache": "exact",
    "data.feature_cache_dir": None,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan in its fastest form that fits.

    Attributes:
        changes: of the configuration, by key.
        bytes: of the whole process at its peak, decoded images left out.
        flops: of an update. seconds: the same; None where nothing was timed.
        trained: weights. patches: share of the image's that the last block still sees.
    """

    changes: dict[str, Any]
    bytes: int
    flops: int
    seconds: float | None
    trained: int
    patches: float

    @property
    def costs(self) -> tuple[float, ...]:
        """What a plan is judged by; all the better the smaller."""
        return self.seconds or self.flops, self.bytes, 1 / self.trained, 1 / self.patches


class Catalog:
    """The plans of one backbone and some tasks for a memory.

    Attributes:
        base: bytes of a process without a model.
        least: bytes of the leanest plan, once `plans` has looked.
    """

    def __init__(self, config: Config, classes: dict[str, int], limit: int, runtime: Runtime, timed: bool) -> None:
        """
        Args:
            limit: bytes of the whole process. timed: whether blocks are timed here.
        """
        require(config.train.optimizer != "lbfgs", "train.optimizer", "lbfgs", "adamw, adamw8 or sgd: blocks train")
        require_tokens(config.backbone, "a list of plans")
        self.config, self.classes, self.limit, self.precision = config, classes, limit, runtime.precision
        self.base = 0 if runtime.device.type == "cuda" else memory.resident() + SPARE
        self.vit = family_of(config.backbone).create_on_meta(config.backbone)
        self.rates = Rates(config, classes, self.vit, runtime) if timed else None
        self.least: int | None = None
        self._evaluation = 0
        self._models: dict[str, MultitaskViT] = {}

    def plans(self) -> list[Plan]:
        """All that fit."""
        heads = self._cost(*self._configured(PLAIN | {"plan.train_blocks": [], **_dropping([], 1.0)}), BATCH)
        self._evaluation = heads.transients["forward"]  # as much as one takes beside the parameters
        # Heads alone first: what needs more than the leanest plan so far need not be known exactly.
        looked = sorted(candidates(self.config, self.vit), key=lambda changes: bool(changes["plan.train_blocks"]))
        forms = (self._fastest(changes) for changes in looked)
        return [plan for plan in forms if plan is not None]

    def _fastest(self, changes: dict[str, Any]) -> Plan | None:
        """A plan with the optimizer of the configuration if it fits at once, else with moments in 8 bits if faster."""
        found = []
        for optimizer in ("adamw", "adamw8") if self.config.train.optimizer == "adamw" else (None,):
            own = changes if optimizer is None else changes | {"train.optimizer": optimizer}
            if (form := self._first_that_fits(own)) is not None:
                found.append(form)
                if form.changes["storage"] == "exact" and form.changes["train.grad_accumulation_steps"] == 1:
                    break
        return min(found, key=lambda plan: plan.costs, default=None)

    def _first_that_fits(self, changes: dict[str, Any]) -> Plan | None:
        """Saved exactly, else in micro-batches, else packed, else computed again."""
        batch, beside = self.config.train.batch_size, 0
        for storage in STORAGES:
            parts = 1
            while parts in MICRO_BATCHES and batch % parts == 0 and (parts == 1 or batch // parts >= LEAST_IMAGES):
                form = changes | {"storage": storage, "train.grad_accumulation_steps": parts}
                try:
                    config, model = self._configured(form)
                    if parts > 1 and self._is_too_much(config, model, beside):
                        parts *= 2
                        continue
                    cost = self._cost(config, model, batch // parts)
                except ConfigError:  # what this backbone cannot be, or this configuration in so many micro-batches
                    break
                always = self.base + cost.parameters + cost.optimizer + cost.average
                needed = max(self.base + cost.peak, always + self._evaluation)
                self.least = min(needed, self.least or needed)
                if needed <= self.limit:
                    return self._plan(form, config, model, cost, needed)
                beside = always + cost.gradients
                room = self.limit - beside
                if room <= 0 or always + self._evaluation > self.limit:
                    return None  # in no form
                wanted = parts * (needed - beside) / room  # what a step keeps shrinks with its images
                parts *= 2
                while parts < wanted:
                    parts *= 2
        return None

    def _plan(self, changes: dict[str, Any], config: Config, model: MultitaskViT, cost: Cost, needed: int) -> Plan:
        parts = config.train.grad_accumulation_steps
        tasks = len(model.trained_tasks) if config.sampler.kind == "joint" else 1
        tokens = self.vit.patch_embed.num_patches + self.vit.num_prefix_tokens
        counts = token_counts(
            model.plan, tokens, self.vit.num_prefix_tokens, config.tokens.fuses, config.tokens.protect_fused
        )
        images = min(config.data.image_cache_mb, (self.limit - needed) // 2 // 10**6)
        return Plan(
            changes | {"data.image_cache_mb": images},
            needed,
            tasks * parts * cost.step_flops,
            self.rates and self.rates.seconds(config, model),
            sum(p.numel() for p in model.parameters() if p.requires_grad),
            (counts[-1][0] - self.vit.num_prefix_tokens) / self.vit.patch_embed.num_patches,
        )

    def _is_too_much(self, config: Config, model: MultitaskViT, beside: int) -> bool:
        """Whether a form of several micro-batches neither fits nor is the leanest so far, as one block shows.

        Args:
            beside: bytes of the process, weights, state and gradients.
        """
        images = config.train.batch_size // config.train.grad_accumulation_steps
        least = least_beside_gradients(model, config, batch=images, precision=self.precision)
        return beside + least > max(self.limit, self.least or 0)

    def _configured(self, changes: dict[str, Any]) -> tuple[Config, MultitaskViT]:
        config = configuration.replace(self.config, **{key.replace(".", "__"): value for key, value in changes.items()})
        return config, self._model(config)

    def _cost(self, config: Config, model: MultitaskViT, images: int) -> Cost:
        return predict(model, config, batch=images, precision=self.precision, all_tasks=True)

    def _model(self, config: Config) -> MultitaskViT:
        """Models that differ in dropping and storage alone are one, whose plan changes."""
        key = repr((config.plan.train_blocks, config.plan.moe_blocks, config.moe))
        if key not in self._models:
            self._models[key] = MultitaskViT(copy.deepcopy(self.vit), config, self.classes)
        model = self._models[key]
        model.plan = make_plan(config, len(self.vit.blocks))
        model.contexts = contexts(model.vit, model.plan, config.tokens)
        return model


def candidates(config: Config, vit: VisionTransformer) -> Iterator[dict[str, Any]]:
    """Changes of a configuration, by key: every plan that is looked at, the configuration's own first."""
    depth, plan = len(vit.blocks), config.plan
    late = [list(range(depth - count, depth)) for count in (0, 2, depth // 3)]
    thirds = [depth * part // 3 - 1 for part in (1, 2, 3)]  # 3, 7, 11 of 12
    early = [depth * part // 4 - depth // 6 for part in (1, 2, 3)]  # 1, 4, 7 of 12
    trained = [*late, thirds, "all", plan.train_blocks]
    drops = [([], 1.0), (early, 0.66), (plan.drop_blocks, plan.keep_rate)]
    own = _dropping(plan.drop_blocks, plan.keep_rate) | {"plan.train_blocks": plan.train_blocks}
    experts = {key: getattr(config.moe, key.removeprefix("moe.")) for key in EXPERTS[1]}  # where a plan says none
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
    """Those that no other plan is as good as in all its costs, the fastest first.

    Returns:
        The plans, and the share within which costs were taken for equal, the smallest that leaves at most `most`.
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
