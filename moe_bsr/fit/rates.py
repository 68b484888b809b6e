"""How fast this machine trains a backbone: seconds for a FLOP, by kind of block, from two blocks that are timed.

A block costs what its kind does (frozen before the gradient path, dense or with experts on it, by storage and images of
a micro-batch), FLOP by FLOP. Blocks of a ViT are alike, so a network of two of them, with random weights, tells of
all. Each kind is timed when it is first asked for.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from timm.models.vision_transformer import VisionTransformer

from moe_bsr import config as configuration
from moe_bsr.config import Config
from moe_bsr.cost.predict import Cost, predict
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runtime.device import Runtime
from moe_bsr.training.update import training_step

IMAGES = 4  # at most, of a micro-batch that is timed
REPEATS = 2  # after one that chooses kernels
DENSE = ("dense",)  # experts of a block that has none


@dataclass(slots=True)
class Rates:
    """Attributes:
    vit: the backbone, on the meta device. classes: by task.
    """

    config: Config
    classes: dict[str, int]
    vit: VisionTransformer
    runtime: Runtime
    _known: dict[tuple, tuple[float, float]] = field(default_factory=dict)

    def seconds(self, config: Config, model: MultitaskViT, cost: Cost) -> float:
        """Of an update of `config`, whose micro-batches of one task cost `cost`."""
        storage, parts = config.storage, config.train.grad_accumulation_steps
        images = min(IMAGES, config.train.batch_size // parts)
        frozen, _ = self._rate(None, "exact", images, config)
        dense, _ = self._rate(DENSE, storage, images, config) if model.path_start < len(model.plan) else (frozen, 0.0)
        total = 0.0
        for section, flops in cost.flops_by_block.items():
            kind, _, index = section.partition(" ")
            rate = dense if kind == "head" or model.embedding_trains else frozen
            if kind == "block" and int(index) >= model.path_start:
                plan = model.plan[int(index)]
                rate = self._rate(_experts(config), storage, images, config)[0] if plan.moe else dense
            total += rate * flops
        _, step = self._rate(_experts(config) if config.plan.moe_blocks else DENSE, "exact", images, config)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        tasks = len(model.trained_tasks) if config.sampler.kind == "joint" else 1
        return tasks * parts * total + step * trained

    def _rate(self, experts: tuple | None, storage: str, images: int, config: Config) -> tuple[float, float]:
        """Seconds for a FLOP of forward and backward, and for a trained weight of the optimizer's step.

        Args:
            experts: of the block that trains, as `_experts` has them; None where none trains.
        """
        key = experts, storage, images, config.train.optimizer
        if key not in self._known:
            self._known[key] = self._timed(experts, storage, images, config)
        return self._known[key]

    def _timed(self, experts: tuple | None, storage: str, images: int, config: Config) -> tuple[float, float]:
        trained, with_experts = [] if experts is None else [0], [] if experts in (None, DENSE) else [0]
        config = configuration.replace(
            config,
            adapter=None,
            storage=storage,
            plan__train_blocks=trained,
            plan__moe_blocks=with_experts,
            plan__drop_blocks=[],
            plan__keep_rate=1.0,
            plan__head_blocks=[],
            train__batch_size=images,
            train__grad_accumulation_steps=1,
        )
        vit = copy.deepcopy(self.vit)
        vit.blocks = vit.blocks[:2]
        vit.to_empty(device="cpu")
        for parameter in vit.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        model = self.runtime.place(MultitaskViT(vit, config, self.classes))
        flops = predict(model, config, batch=images, precision=self.runtime.precision).step_flops
        step = training_step(model, config, self.runtime, batch=images)
        forward_backward, update = [], []
        with self.runtime.in_effect():
            for _ in range(1 + REPEATS):
                forward_backward.append(self._time(lambda: (step.forward(), step.backward())))
                update.append(self._time(step.step))
                step.clear()
        weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return min(forward_backward[1:]) / flops, min(update[1:]) / weights

    def _time(self, work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.runtime.device)
        return time.perf_counter() - began


def _experts(config: Config) -> tuple:
    return (repr(config.moe),)
