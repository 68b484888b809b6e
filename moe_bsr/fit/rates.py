"""How long this machine takes for an update of a plan: each kind of block is timed once, with the tokens it gets.

The embedding, a block and the head know nothing of the rest of a network, and blocks of one backbone are alike. So a
kind of block (frozen, on the gradient path, trained, with experts, dropping, by storage and number of tokens) is run
alone on random tokens, in a network of two blocks with random weights, and an update is the sum of its blocks. Each is
timed when it is first asked for.
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
from moe_bsr.model.plan import BlockPlan, token_counts
from moe_bsr.model.tokens import Tokens
from moe_bsr.runtime.device import Runtime
from moe_bsr.training.update import random_batch, training_step

FLOPS = 3e9  # about as many has a block's forward pass that is timed on a CPU; a GPU gets the whole micro-batch
REPEATS = 2  # after one that chooses kernels


@dataclass(slots=True)
class Rates:
    """Attributes:
    vit: the backbone, on the meta device. classes: by task.
    """

    config: Config
    classes: dict[str, int]
    vit: VisionTransformer
    runtime: Runtime
    _known: dict[Hashable, float] = field(default_factory=dict)
    _networks: dict[Hashable, MultitaskViT] = field(default_factory=dict)

    def seconds(self, config: Config, model: MultitaskViT) -> float:
        """Of an update of `config`, whose plan `model` has; it may be on the meta device."""
        parts = config.train.grad_accumulation_steps
        images = config.train.batch_size // parts
        few = images if self.runtime.device.type == "cuda" else min(images, self._images())
        path, last, differentiates = model.path_start, len(model.plan) - 1, config.train.differentiates
        alone = model.contexts[-1].class_token_alone
        pass_ = self._ends(model.embedding_trains, config, few)
        for index, (plan, tokens) in enumerate(zip(model.plan, self._tokens(model, config), strict=True)):
            gradients = None if index < path or not differentiates else index > path or model.embedding_trains
            pass_ += self._block(plan, tokens, gradients, alone and index == last, config, few)
        passes = parts if differentiates else 2 * parts
        passes *= len(model.trained_tasks) if config.sampler.kind == "joint" else 1
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return passes * images / few * pass_ + trained * self._weight(bool(config.plan.moe_blocks), config)

    def _images(self) -> int:
        tokens = self.vit.patch_embed.num_patches + self.vit.num_prefix_tokens
        return max(1, int(FLOPS / (24 * tokens * self.vit.embed_dim**2)))

    def _tokens(self, model: MultitaskViT, config: Config) -> list[int]:
        """That enter each block."""
        prefix, tokens = self.vit.num_prefix_tokens, config.tokens
        whole = self.vit.patch_embed.num_patches + prefix
        return [entering for entering, _ in token_counts(model.plan, whole, prefix, tokens.fuses, tokens.protect_fused)]

    def _block(
        self, plan: BlockPlan, tokens: int, gradients: bool | None, alone: bool, config: Config, images: int
    ) -> float:
        """Seconds of a block for so many images.

        Args:
            gradients: whether the tokens that enter it have some; None: it lies before the gradient path.
            alone: whether it leaves the class token alone.
        """

        def timed() -> float:
            network = self._network(plan.trainable, plan.moe, alone, config)
            frozen = BlockPlan(False)
            network.plan = [frozen, plan] if alone else [plan, frozen]
            network.contexts = contexts(network.vit, network.plan, config.tokens)
            entering = self._entering(images, tokens, config)

            def run() -> None:
                x = entering.x.clone().requires_grad_(bool(gradients))  # a leaf: nobody else's gradient
                with torch.set_grad_enabled(gradients is not None), self.runtime.autocast():
                    taken = dataclasses.replace(entering, x=x)
                    y = network.run_block(int(alone), taken, network.tasks[0], (0, 0, 0)).x
                if gradients is not None:
                    y.backward(torch.ones_like(y))

            return self._time(run, network)

        key = plan, tokens, gradients, alone, images, repr((plan.moe and config.moe, config.tokens))
        return self._once(key, timed)

    def _ends(self, trains: bool, config: Config, images: int) -> float:
        """Seconds of the embedding, and of pooling, a head and the loss."""

        def timed() -> float:
            network = self._network("all" if trains else False, False, False, config)
            task, tokens = network.tasks[0], self._tokens(network, config)[0]
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
        """Seconds of the optimizer's step for a weight that trains; experts' are few large tensors."""

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
        """Random tokens; where tokens were merged before, each stands for several patches."""
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
        """Two blocks with random weights, the first or last of which trains or has experts.

        Args:
            trains: "all": the embedding and both.
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
        """The least of some runs, each from a network without gradients."""
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
