"""A training step in parts, on random images: what the meter and the benchmark run and take apart."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_bsr.config import Config
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runtime.device import Runtime
from moe_bsr.training.optim import clip_gradients, make_optimizer


class TrainingStep:
    """One optimizer update of any model: forward, backward, update; `run` does all three.

    Attributes:
        trained: the parameters that got a gradient in the last backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        optimizer: torch.optim.Optimizer,
        *,
        output: Callable[[], Any],
        loss: Callable[[Any], Tensor],
        clip: bool = False,
        commit: Callable[[Any], None] = lambda output: None,
    ) -> None:
        """Args:
        output: the model's forward pass, called under the machine's autocast.
        loss: of that output, outside autocast.
        clip: whether the gradient's norm is computed and clipped.
        commit: what else is done with the output after the backward pass.
        """
        self.model, self.runtime, self.optimizer = model.train(), runtime, optimizer
        self._output, self._loss, self._clip, self._commit = output, loss, clip, commit
        self.output = self.loss = None
        self.trained: list[Tensor] = []

    def forward(self) -> None:
        with self.runtime.autocast():
            self.output = self._output()
        self.loss = self._loss(self.output)

    def backward(self) -> None:
        self.loss.backward()
        self.loss = None
        self._commit(self.output)
        self.trained = [p for p in self.model.parameters() if p.grad is not None]

    def update(self) -> None:
        if self._clip:
            clip_gradients(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def clear(self) -> None:
        self.output = self.loss = None

    def run(self) -> None:
        self.forward()
        self.backward()
        self.update()
        self.clear()

    @torch.no_grad()
    def infer(self) -> None:
        """The forward pass alone, as evaluation runs it."""
        with self.runtime.autocast():
            self._output()


def random_batch(images: int, size: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, 3, S, S) standard normal images and (B,) labels, the same ones every time."""
    draws = torch.Generator().manual_seed(0)
    return (
        torch.randn(images, 3, size, size, generator=draws).to(device),
        torch.randint(classes, (images,), generator=draws).to(device),
    )


def training_step(
    model: MultitaskViT, config: Config, runtime: Runtime, *, batch: int, task: str | None = None
) -> TrainingStep:
    """A step of one of our models the way the trainer takes it.

    Args:
        model: on the machine already (`machine.place`).
        task: the first one by default.
    """
    task = task or model.tasks[0]
    images, labels = random_batch(
        batch, model.vit.patch_embed.img_size[0], model.heads[task].out_features, runtime.device
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=config.train.label_smoothing)
    return TrainingStep(
        model,
        runtime,
        make_optimizer(model, config.train, len(model.plan)),
        output=lambda: model(images, task, noise_key=(0, 0, 0)),
        loss=lambda output: criterion(output.logits.float(), labels) + output.auxiliary_loss,
        clip=True,
        commit=lambda output: model.commit(output, task),
    )
