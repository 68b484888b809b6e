"""Models and losses that the tests of several storages share."""

import torch
from tiny_models import make_vit, normal
from torch.nn import functional as F

from moe_bsr import config as configuration
from moe_bsr.benchmark.measure import kept_for_backward
from moe_bsr.config import Config
from moe_bsr.cost.predict import Cost, predict
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runtime.device import prepare
from moe_bsr.training.update import TrainingStep, training_step

# Special property of the blocks -> arguments of `make_model`.
MODELS = {
    "dense": {},
    "experts": {"moe_blocks": (1, 3), "init_noise": 0.1},
    "lora": {"adapter": {"kind": "lora", "rank": 2}, "train_blocks": ()},
    "qk-norm": {"kind": "qk-norm"},
    "no class token": {"kind": "average-pool"},
}


def forward(model: MultitaskViT, images: int, bf16: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and the logits of random images of task "one"."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = model(normal(images, 3, 16, 16), "one")
    return F.cross_entropy(output.logits, torch.arange(images) % 3) + output.auxiliary_loss, output.logits


def predicted_and_step(storage, images: int, train_blocks="all") -> tuple[Cost, TrainingStep]:
    """Return the predicted cost and the step of a model without experts and token dropping."""
    config = configuration.replace(
        Config(),
        storage=storage,
        runtime__device="cpu",
        runtime__precision="fp32",
        runtime__threads=1,
        plan__train_blocks=train_blocks,
        plan__drop_blocks=[],
        plan__moe_blocks=[],
    )
    model = MultitaskViT(make_vit(), config, {"one": 3, "two": 5})
    cost = predict(model, config, batch=images, precision="fp32", task="two")
    return cost, training_step(model, config, prepare(config.runtime), batch=images, task="two")


def kept_by_block(cost: Cost) -> dict[str, int]:
    return {name: sum(makers.values()) for name, makers in cost.kept_by_block.items()}


def kept_by(step: TrainingStep) -> int:
    """Return the bytes that a step actually keeps for its backward pass."""
    return sum(allocation.bytes for allocation in kept_for_backward(step)[0])
