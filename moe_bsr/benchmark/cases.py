"""Cases of the benchmark: baselines, our plans and storages, and an expert layer next to a dense one."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import timm
import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from moe_bsr import config as configuration
from moe_bsr.benchmark.public_form import ExplicitBSR
from moe_bsr.config import Config
from moe_bsr.model import block
from moe_bsr.model.moe import MoE
from moe_bsr.model.multitask import build
from moe_bsr.model.replay import Replay
from moe_bsr.model.storage import STORAGES
from moe_bsr.runtime.device import Runtime, prepare, tune_process
from moe_bsr.training.update import TrainingStep, random_batch, training_step

CLASSES = 100
PRECISIONS = ("fp32", "bf16")
BSR = {"train_blocks": [3, 7, 11], "drop_blocks": [3, 6, 9], "keep_rate": 0.5, "moe_blocks": []}
PLANS = {
    "full": BSR | {"train_blocks": "all", "drop_blocks": []},
    "bsr": BSR,
    "moe_full": BSR | {"train_blocks": "all", "drop_blocks": [], "moe_blocks": [3, 7, 11]},
    "moe_bsr": BSR | {"moe_blocks": [3, 7, 11]},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model to be timed.

    Attributes:
        subject: timm (stock modules), explicit (the public form of BSR), moe_ffn and dense_ffn (one layer, forward and
            backward), or a plan of `PLANS`.
        tuned: whether our allocator settings apply. Otherwise the process stays as Python started it.
        changes: further keys of the configuration, with __ in place of dots: `moe__num_experts`.
    """

    subject: str
    precision: str = "fp32"
    tuned: bool = True
    storage: str = "exact"
    backbone: str = "deit_small_patch16_224"
    image_size: int | None = None
    batch: int = 32
    tasks: int = 1
    device: str = "cpu"
    threads: int | None = None
    changes: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        parts = [self.subject, self.precision]
        if self.subject in PLANS and self.storage != "exact":
            parts.append(self.storage)
        if self.subject in ("timm", "explicit"):
            parts.append("tuned" if self.tuned else "stock")
        return " ".join(parts)


def suite(storages: list[str] | None = None, precisions: Sequence[str] = PRECISIONS, **shared) -> dict[str, list[Case]]:
    """Return the groups of cases that run side by side. Cases that a target compares are in one group.

    All cases at once would not fit into memory.

    Args:
        storages: of the BSR cases; by default all with faithful gradients.
        shared: fields of every case: backbone, batch, device and so on.
    """
    storages = [s for s in STORAGES if not STORAGES[s].coarse] if storages is None else storages

    def plans(subject: str, precision: str, stored: Sequence[str] = ("exact",)) -> list[Case]:
        return [Case(subject=subject, precision=precision, storage=storage, **shared) for storage in stored]

    groups = {}
    for precision in precisions:
        stock, tuned, *explicit = [
            Case(subject=subject, precision=precision, tuned=tuned, **shared)
            for subject in ("timm", "explicit")
            for tuned in (False, True)
        ]
        lean = [storage for storage in storages if storage in ("exact", "recompute")]
        groups[precision] = [stock, tuned, *explicit, *plans("full", precision), *plans("bsr", precision, lean)]
        groups[f"experts {precision}"] = [
            stock,
            *plans("moe_full", precision),
            *plans("moe_bsr", precision, lean),
            *plans("moe_ffn", precision),
            *plans("dense_ffn", precision),
        ]
    # All storages are compared with what a user has by default: stock timm in float32.
    leanest = groups.get("fp32", groups[precisions[0]])
    leanest += [case for case in plans("bsr", precisions[-1], storages) if case not in leanest]
    return groups


def make(case: Case) -> TrainingStep:
    """Make the case's step, with random weights and images. To be called in a process of its own."""
    config = configuration.from_dict(
        {
            "tasks": [f"task{i}" for i in range(case.tasks)],
            "storage": case.storage,
            "backbone": {"name": case.backbone, "weights": "random", "image_size": case.image_size},
            "plan": PLANS.get(case.subject, BSR),
            "train": {"batch_size": case.batch},
            "runtime": {"device": case.device, "precision": case.precision, "threads": case.threads},
        }
    )
    config = configuration.replace(config, **case.changes)
    if case.tuned:
        tune_process(case.threads)
        runtime = prepare(config.runtime)
    else:  # no allocator settings
        if case.threads is not None:
            torch.set_num_threads(case.threads)
        runtime = Runtime(torch.device(case.device), case.precision, torch.get_num_threads(), "asked for")
    if case.subject in PLANS:
        model = runtime.place(build(config, dict.fromkeys(config.task_names(), CLASSES)))
        return training_step(model, config, runtime, batch=case.batch)
    if case.subject in ("moe_ffn", "dense_ffn"):
        return _layer_step(case, config, runtime)
    return _plain_step(case, config, runtime)


def _plain_step(case: Case, config: Config, runtime: Runtime) -> TrainingStep:
    """timm's model, or the explicit BSR, in the simplest training loop."""
    size = {} if case.image_size is None else {"img_size": case.image_size}
    model = timm.create_model(case.backbone, num_classes=CLASSES, **size)
    side = model.patch_embed.img_size[0]
    if case.subject == "explicit":
        model = ExplicitBSR(model, config.plan)
    return plain_step(model, runtime, case.batch, side, CLASSES)


def plain_step(model: nn.Module, runtime: Runtime, batch: int, side: int, classes: int) -> TrainingStep:
    """Return the simplest training step, with torch's AdamW, on random images."""
    images, labels = random_batch(batch, side, classes, runtime.device)
    model = model.to(runtime.device)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    return TrainingStep(
        model,
        runtime,
        optimizer,
        output=lambda: model(images),
        loss=lambda logits: F.cross_entropy(logits.float(), labels),
    )


def _layer_step(case: Case, config: Config, runtime: Runtime) -> TrainingStep:
    """One FFN on the tokens of a batch: experts, or a dense FFN with the same number of multiplications."""
    vit = timm.create_model(case.backbone, num_classes=0)
    width, tokens = vit.embed_dim, vit.patch_embed.num_patches + vit.num_prefix_tokens
    draws = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    x, gradient = (torch.randn(case.batch, tokens, width, generator=draws).to(runtime.device, dtype) for _ in range(2))
    x.requires_grad_()
    if case.subject == "moe_ffn":
        model = MoE(vit.blocks[0].mlp, config.moe, config.task_names(), (0,)).to(runtime.device)
        for weight in model.router.parameters():
            weight.data.mul_(10)  # as trained routers, whose logits are farther apart

        def output() -> Tensor:
            return model(x, config.task_names()[0], Replay())[0]
    else:
        model = Mlp(width, config.moe.top_k * config.moe.mlp_ratio * width).to(runtime.device)

        def output() -> Tensor:
            return block.feed_forward(model, x)

    return LayerStep(model, runtime, x, gradient, output)


class LayerStep(TrainingStep):
    """Forward and backward pass of one layer, without an optimizer step, whose time grows with the experts' size."""

    def __init__(self, model: nn.Module, runtime: Runtime, x: Tensor, gradient: Tensor, output) -> None:
        """Make a step.

        Args:
            x: (B, N, D) input, whose gradient is computed. gradient: (B, N, D) gradient of the output.
        """
        super().__init__(
            model, runtime, torch.optim.SGD([x, *model.parameters()], lr=0.0), output=output, loss=lambda y: y
        )
        self.gradient = gradient

    def backward(self) -> None:
        self.loss.backward(self.gradient)
        self.loss = self.output = None
        self.trained = [p for p in self.model.parameters() if p.grad is not None]

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
