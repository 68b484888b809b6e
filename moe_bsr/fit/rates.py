"""Estimate the time of an update under a plan on this machine, from the times of its kinds of blocks.

The times of the embedding, a block and the head do not depend on the rest of the network. Blocks of one backbone differ
only in kind: frozen, on the gradient path, trained, with experts, dropping tokens, storage, number of tokens. Each kind
is timed once, when it is first needed, on random tokens in a network of two blocks with random weights. The time of an
update is the sum over its blocks.
"""

import copy
import dataclasses
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer

from moe_bsr import config as configuration
from moe_bsr.config import Config
from moe_bsr.model.block import contexts
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.plan import BlockPlan
from moe_bsr.model.summary import counts
from moe_bsr.model.tokens import Tokens
from moe_bsr.runtime.device import Runtime
from moe_bsr.training.update import random_batch, training_step

FLOPS = 3e9  # approximate size of a block's timed forward pass on a CPU. A GPU is timed with the whole micro-batch.
REPEATS = 2  # timed runs, after one in which kernels are chosen


@dataclass(slots=True)
class Rates:
    """Times of the kinds of blocks of one backbone on this machine.

    Attributes:
        vit: the backbone, on the meta device. classes: number of classes by task.
    """

    config: Config
    classes: dict[str, int]
    vit: VisionTransformer
    runtime: Runtime
    _known: dict[Hashable, float] = field(default_factory=dict)
    _networks: dict[Hashable, MultitaskViT] = field(default_factory=dict)

    def seconds(self, config: Config, model: MultitaskViT) -> float:
        """Return the estimated seconds of an update.

        Args:
            model: has the plan of `config`; may be on the meta device.
        """
        parts = config.train.grad_accumulation_steps
        images = config.train.batch_size // parts
        few = images if self.runtime.device.type == "cuda" else min(images, self._images())
        path, last, differentiates = model.path_start, len(model.plan) - 1, config.train.differentiates
        alone = model.contexts[-1].class_token_alone
        pass_ = self._ends(model.embedding_trains, config, few)
        for index, (plan, (tokens, _)) in enumerate(zip(model.plan, counts(model), strict=True)):
            gradients = None if index < path or not differentiates else index > path or model.embedding_trains
            pass_ += self._block(plan, tokens, gradients, alone and index == last, config, few)
        passes = parts if differentiates else 2 * parts
        passes *= len(model.trained_tasks) if config.sampler.kind == "joint" else 1
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return passes * images / few * pass_ + trained * self._weight(bool(config.plan.moe_blocks), config)

    def _images(self) -> int:
        tokens = self.vit.patch_embed.num_patches + self.vit.num_prefix_tokens
        return max(1, int(FLOPS / (24 * tokens * self.vit.embed_dim**2)))

    def _block(
        self, plan: BlockPlan, tokens: int, gradients: bool | None, alone: bool, config: Config, images: int
    ) -> float:
        """Return the seconds of a block for `images` images, forward and backward.

        Args:
            gradients: whether the entering tokens require gradients; None: the block is before the gradient path.
            alone: whether the block computes only the class token.
        """

        def timed() -> float:
            network = self._network(plan.trainable, plan.moe, alone, config)
            frozen = BlockPlan(False)
            network.plan = [frozen, plan] if alone else [plan, frozen]
            network.contexts = contexts(network.vit, network.plan, config.tokens)
            entering = self._entering(images, tokens, config)

            def run() -> None:
                x = entering.x.clone().requires_grad_(bool(gradients))  # a new leaf, without a gradient
                with torch.set_grad_enabled(gradients is not None), self.runtime.autocast():
                    taken = dataclasses.replace(entering, x=x)
                    y = network.run_block(int(alone), taken, network.tasks[0], (0, 0, 0)).x
                if gradients is not None:
                    y.backward(torch.ones_like(y))

            return self._time(run, network)

        key = plan, tokens, gradients, alone, images, repr((plan.moe and config.moe, config.tokens))
        return self._once(key, timed)

    def _ends(self, trains: bool, config: Config, images: int) -> float:
        """Return the seconds of the embedding, pooling, one head and the loss, forward and backward."""

        def timed() -> float:
            network = self._network("all" if trains else False, False, False, config)
            task, tokens = network.tasks[0], counts(network)[0][0]
            pixels, labels = random_batch(
                images, network.image_size, network.heads[task].out_features, self.runtime.device
            )
            entering = self._entering(images, tokens, config)

            def run() -> None:
                with torch.set_grad_enabled(trains), self.runtime.autocast():
                    embedded = network.family.embed(network.vit, pixels).x
                if embedded.requires_grad:
                    embedded.backward(torch.ones_like(embedded))
                x = entering.x.clone().requires_grad_()
                with self.runtime.autocast():
                    logits = network.logits(dataclasses.replace(entering, x=x), task)
                torch.nn.functional.cross_entropy(logits, labels).backward()

            return self._time(run, network)

        return self._once(("ends", trains, images), timed)

    def _weight(self, experts: bool, config: Config) -> float:
        """Return the seconds per trained weight of the optimizer's step.

        Experts are timed separately: their weights are in a few large tensors.
        """

        def timed() -> float:
            network = self._network(True, experts, False, config)
            network.plan = [dataclasses.replace(network.plan[0], storage=BlockPlan(True).storage), BlockPlan(False)]
            network.contexts = contexts(network.vit, network.plan, config.tokens)
            after = configuration.replace(config, train__step_in_backward=False)
            step = training_step(network, after, self.runtime, batch=1)

            def gradients() -> None:
                step.forward()
                step.backward()

            took = self._time(step.step, network, before=gradients)
            step.clear()
            return took / sum(p.numel() for p in network.parameters_of(network.tasks[0]) if p.requires_grad)

        return self._once(("weight", experts and repr(config.moe), config.train.optimizer), timed)

    def _entering(self, images: int, tokens: int, config: Config) -> Tokens:
        """Return random tokens that enter a block. After merging, each of them represents several patches."""
        vit, device = self.vit, self.runtime.device
        prefix, patches = vit.num_prefix_tokens, vit.patch_embed.num_patches
        x = torch.randn(images, tokens, vit.embed_dim, device=device)
        x = x.to(torch.bfloat16) if self.runtime.precision == "bf16" else x
        origin = torch.arange(tokens - prefix, device=device).expand(images, -1)
        place = None
        if config.tokens.reduce == "merge" and tokens < patches + prefix:
            place = (torch.arange(patches, device=device) % (tokens - prefix)).expand(images, -1)
        return Tokens(x, origin, place=place)

    def _network(self, trains: bool | Literal["all"], experts: bool, last: bool, config: Config) -> MultitaskViT:
        """Return a network of two blocks with random weights, made once per kind.

        Args:
            trains: whether one block trains; "all": the embedding and both blocks do. experts: whether it has experts.
            last: whether that block is the last one rather than the first.
        """

        def made() -> MultitaskViT:
            where = [int(last)]
            own = configuration.replace(
                config,
                adapter=None,
                storage="exact",
                plan__train_blocks="all" if trains == "all" else where if trains else [],
                plan__moe_blocks=where if experts else [],
                plan__drop_blocks=[],
                plan__keep_rate=1.0,
                plan__head_blocks=[],
                train__batch_size=1,
                train__grad_accumulation_steps=1,
            )
            vit = copy.deepcopy(self.vit)
            vit.blocks = vit.blocks[:2]
            vit.to_empty(device="cpu")
            for parameter in vit.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            return self.runtime.place(MultitaskViT(vit, own, self.classes)).train()

        key = trains, last, experts and repr(config.moe)
        if key not in self._networks:
            self._networks[key] = made()
        return self._networks[key]

    def _once(self, key: Hashable, timed: Callable[[], float]) -> float:
        if key not in self._known:
            self._known[key] = timed()
        return self._known[key]

    def _time(
        self, work: Callable[[], object], network: MultitaskViT, before: Callable[[], object] = lambda: None
    ) -> float:
        """Return the shortest time of some runs, each starting without gradients. `before` is not timed."""
        took = []
        with self.runtime.in_effect():
            for _ in range(1 + REPEATS):
                before()
                began = self._now()
                work()
                took.append(self._now() - began)
                network.zero_grad(set_to_none=True)
        return min(took[1:])

    def _now(self) -> float:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.runtime.device)
        return time.perf_counter()
