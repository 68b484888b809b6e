"""What a training step truly holds, predicted by tracing the code that the trainer runs.

`predict` traces each kind of section of a model once, with fake tensors, and puts a step together from them.
The network is never run; a model on the meta device will do.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_bsr import ops
from moe_bsr.config import Config, ConfigError
from moe_bsr.cost import kernel_scratch
from moe_bsr.cost.expert_rows import largest_share, unequal_rows
from moe_bsr.cost.fingerprint import fingerprint
from moe_bsr.cost.head_section import trace_head
from moe_bsr.cost.model_sections import Setting, modules_of_sections, of_task, trace_block, trace_embedding
from moe_bsr.cost.sections import Section, standing_in
from moe_bsr.cost.timeline import Placed, Timeline
from moe_bsr.cost.trace import WEIGHT_COPY
from moe_bsr.cost.update_section import Update, trace_update
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runtime import cpu_features as cpu
from moe_bsr.runtime.device import Runtime, find_device
from moe_bsr.training.drawn_blocks import costliest_update


@dataclass(slots=True)
class Cost:
    """Bytes and FLOPs of one micro-batch's training step and the update after it.

    Attributes:
        parameters: weights and buffers as they are kept while training (frozen matrices in the compute dtype).
        copies: of trained weights in the compute dtype, alive from the forward to the backward; part of `kept`.
        gradients, optimizer: at the end of the backward and from the first update on.
        average: the copy of the trained parameters that `train.ema_decay` keeps.
        written: kept on disk for the backward pass, in place of memory; no part of `kept`.
        kept: for the backward pass. kept_by_block: the same by the section and the operator that made it.
        transients: most bytes alive in forward, backward and optimizer over what lived before the step,
            `kept` included, gradients not.
        peak: of everything but the images and what `data.feature_cache_mb` keeps of them.
        forward_flops, step_flops: of the micro-batch; two for a multiply-add.
        flops_by_block: those of the step by section.
    """

    parameters: int
    copies: int
    gradients: int
    optimizer: int
    average: int
    kept: int
    kept_by_block: dict[str, dict[str, int]]
    transients: dict[str, int]
    peak: int
    forward_flops: int
    step_flops: int
    flops_by_block: dict[str, int]
    written: int = 0

    def summary(self, batch: int) -> str:
        """In one line, for a person who starts a run with these micro-batches."""
        disk = f", {self.written / 2**20:.0f} MB more on disk" if self.written else ""
        return (
            f"predicted: {self.peak / 2**20:.0f} MB of tensors at the peak of a step ({self.kept / 2**20:.0f} MB kept "
            f"for backward{disk}), {self.step_flops / batch / 1e9:.2f} GFLOPs an image to train"
        )

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def predict(
    model: MultitaskViT,
    config: Config,
    *,
    batch: int,
    precision: str,
    task: str | None = None,
    all_tasks: bool = False,
    shares: dict[int, float] | None = None,
    scratch: bool = True,
) -> Cost:
    """The cost of training steps of one task's micro-batches of `batch` images.

    Args:
        model: on any device, `build_on_meta`'s included. precision: "fp32" or "bf16".
        task: by default the one with the most classes.
        all_tasks: as in a run in which every task had its turn: optimizer state of all heads and routers, with
            joint sampling their gradients, and at the peak what earlier micro-batches of an update left.
        shares: by block with experts, the largest expert's group over an equal one, once it is known: values
            decide it.
        scratch: whether kernels' scratch memory counts; without it the numbers are the same on every CPU.
    """
    with as_trained(model, device_of(config), precision):
        return _predict(Step(model, config, batch, precision, shares or {}, scratch), config, task, all_tasks)


def _predict(step: "Step", config: Config, task: str | None, all_tasks: bool) -> Cost:
    model = step.model
    task = task or max(model.trained_tasks, key=lambda name: model.heads[name].out_features)
    tasks = model.trained_tasks if all_tasks and config.sampler.kind == "joint" else [task]
    micro_batches = [name for name in tasks for _ in range(config.train.grad_accumulation_steps if all_tasks else 1)]
    timeline, first, passes = Timeline(), None, 1 if step.setting.differentiates else 2
    done: list[list[Placed]] = []
    with costliest_update(model, config) as resting:
        for name in micro_batches:
            copy = step.copy(name)
            timeline.add(copy)
            for _ in range(passes):
                places = step.places(name)
                kept = timeline.forward(places)
            timeline.add(-copy)
            timeline.backward(places)
            done.append(places)
            if first is None:
                first = kept, dict(timeline.peaks_without), places
    kept, transients, places = first
    gradients = sum(place.section.gradients for places in done for place in places)
    everything = [n for n, p in model.named_parameters() if p.requires_grad] if all_tasks else step.trained | resting
    update = step.update(everything)
    timeline.peaks["optimizer"] = timeline.live + update.rise
    transients["optimizer"] = timeline.live_without + update.rise
    parameters = sum(t.numel() * step.setting.dtype(t).itemsize for t in (*model.parameters(), *model.buffers()))
    peak = max(timeline.peaks.values())
    flops = {p.name: passes * p.section.forward_flops + p.section.backward_flops for p in places}
    return Cost(
        parameters=parameters,
        copies=sum(makers.get(WEIGHT_COPY, 0) for makers in kept.values()),
        gradients=gradients,
        optimizer=update.state,
        average=update.average,
        kept=sum(sum(makers.values()) for makers in kept.values()),
        kept_by_block=kept,
        transients=transients,
        peak=parameters + update.state + update.average + peak,
        forward_flops=sum(place.section.forward_flops for place in places),
        step_flops=sum(flops.values()),
        flops_by_block=flops,
        written=sum(place.section.written for place in places),
    )


MAX_SECTIONS = 10_000
_sections: dict[Hashable, Any] = {}
"""What has been traced in this process, by everything that it depends on."""


class Step:
    """The sections of one model's step, each kind traced once.

    Attributes:
        trained: names of the parameters that have a gradient so far.
    """

    def __init__(
        self,
        model: MultitaskViT,
        config: Config,
        batch: int,
        precision: str,
        shares: dict[int, float],
        scratch: bool,
    ) -> None:
        device = device_of(config)
        threads = config.runtime.threads or torch.get_num_threads()
        narrow = cast_parameters(model) if precision == "bf16" else set()

        def dtype(tensor: Tensor) -> torch.dtype:
            return torch.bfloat16 if id(tensor) in narrow else tensor.dtype

        self.model, self.shares, self.trained = model, shares, set()
        self.setting = Setting(
            model,
            config,
            Runtime(device, precision, threads, ""),
            batch,
            dtype,
            kernel_scratch.on(device, threads) if scratch else kernel_scratch.nothing,
            lambda index: unequal_rows(self._share(index)),
        )
        self.modules = modules_of_sections(model)
        self._fingerprints: dict[tuple[str, str, str], tuple[dict[str, str], tuple]] = {}
        kernels = ops.is_reference(), cpu.mkl_is_slow(), cpu.bf16_instructions(), cpu.onednn_has_bf16()
        moves = not self.setting.differentiates or (
            config.train.step_in_backward and (config.train.optimizer, config.train.momentum)
        )
        self.key = (batch, device, precision, threads, scratch, kernels, repr(config.tokens), moves)

    def _share(self, index: int) -> float:
        moe = self.setting.config.moe
        return self.shares.get(index) or largest_share(self.model.vit.embed_dim, moe.num_experts, moe.top_k)

    def places(self, task: str, blocks: int | None = None) -> list[Placed]:
        """The sections of one micro-batch of a task; what trains in them has a gradient from here on.

        Args:
            blocks: only the embedding and so many of the first; None: all, and the head.
        """
        model, setting = self.model, self.setting
        section = self._section(
            "embedding",
            self.modules["embedding"],
            "",
            task,
            (model.embedding_trains, model.image_size),
            lambda *given: trace_embedding(setting, *given),
        )
        places, streams = [Placed("embedding", section)], [section.stream]
        routing: list[tuple[bool, ...]] = []
        for index, plan in enumerate(model.plan[:blocks]):
            stream = section.stream
            about = (
                plan,
                stream,
                index >= model.path_start,
                self.shares.get(index),
                model.balance.kind,
                model.vit.num_prefix_tokens,
                model.vit.has_class_token,
                model.contexts[index].class_token_alone,
                model.ladder is not None and (index - model.ladder.first, model.ladder.reads(index)),
            )
            section = self._section(
                "block",
                self.modules[f"block {index}"],
                f"vit.blocks.{index}.",
                task,
                about,
                lambda modules, grads, index=index, stream=stream: trace_block(
                    setting, modules, index, task, stream, grads
                ),
            )
            places.append(Placed(f"block {index}", section))
            streams.append(section.stream)
            if section.routing:
                routing.append(section.routing)
        if blocks is not None:
            return places
        about = (
            section.stream,
            tuple(routing),
            model.vit.global_pool,
            repr(setting.config.moe),
            setting.config.train.label_smoothing,
            model.ladder is not None and (tuple(streams), tuple(model.plan)),
        )
        places.append(
            Placed(
                "head",
                self._section(
                    "head",
                    of_task(self.modules["head"], model.tasks, task),
                    "",
                    task,
                    about,
                    lambda modules, grads: trace_head(setting, modules, task, routing, streams, grads),
                ),
            )
        )
        return places

    def _section(
        self,
        kind: str,
        modules: dict[str, nn.Module],
        prefix: str,
        task: str,
        about: tuple,
        trace: Callable[[dict[str, nn.Module], set[str]], Section],
    ) -> Section:
        """Args:
        prefix: of the modules' parameters' names in the model.
        """
        place = kind, prefix, task
        if place not in self._fingerprints:  # of micro-batches before
            self._fingerprints[place] = fingerprint(modules, task, self.model.tasks, self.setting.dtype)
        names, about_modules = self._fingerprints[place]
        has_gradient = {name for name in names if prefix + name in self.trained}
        key = (kind, self.key, about, about_modules, tuple(names[n] for n in names if n in has_gradient))
        if key not in _sections:
            if len(_sections) >= MAX_SECTIONS:
                _sections.clear()
            section = trace(modules, has_gradient)
            section.trained = frozenset(names[name] for name in section.trained if name in names)
            _sections[key] = section
        section = _sections[key]
        self.trained |= {prefix + name for name, alike in names.items() if alike in section.trained}
        return section

    def copy(self, task: str) -> int:
        """Bytes of the weights that a step without gradients changes for a while and brings back."""
        if self.setting.differentiates:
            return 0
        return sum(p.nbytes for p in self.model.parameters_of(task) if p.requires_grad)

    def update(self, stepped: set[str]) -> Update:
        """Of blocks that train it matters which parameters they have, not which blocks they are.

        Args:
            stepped: names of the parameters that had an update before.
        """
        parameters = tuple(
            (re.sub(r"blocks\.\d+", "blocks", name), p.shape, name in stepped, name in self.trained)
            for name, p in self.model.named_parameters()
            if p.requires_grad
        )
        settings = dataclasses.replace(self.setting.config.train, batch_size=1, grad_accumulation_steps=1)
        key = ("update", self.key[1:], parameters, repr(settings), len(self.model.plan))
        if key not in _sections:
            _sections[key] = trace_update(self.setting, stepped, self.trained)
        return _sections[key]


def device_of(config: Config) -> torch.device:
    """The device of a run, which need not be here; "auto" is the best that is.

    Raises:
        ConfigError: no such kind of device.
    """
    name = config.runtime.device
    if name == "auto":
        return find_device(name)
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"runtime.device = {name!r}: {str(error).splitlines()[0]}; use auto, cpu or cuda") from error


@contextlib.contextmanager
def as_trained(model: MultitaskViT, device: torch.device, precision: str) -> Iterator[None]:
    """The model in training mode, its norms as `Runtime.place` sets them, while the context lasts."""
    modes = {module: (module.training, getattr(module, "_fast_norm", None)) for module in model.modules()}
    for module, (_, fast_norm) in modes.items():
        module.training = True
        if fast_norm is not None:
            module._fast_norm = device.type == "cuda" and precision == "bf16"
    try:
        yield
    finally:
        for module, (training, fast_norm) in modes.items():
            module.training = training
            if fast_norm is not None:
                module._fast_norm = fast_norm


def cast_parameters(model: MultitaskViT) -> set[int]:
    """The ids of the parameters that `cast_frozen_` keeps in the compute dtype alone."""
    with standing_in(dict(model.named_modules()), lambda tensor: tensor.new_empty(0, device="cpu")) as parameters:
        model.cast_frozen_(torch.bfloat16)
        cast = {name for name, parameter in parameters.items() if parameter.dtype == torch.bfloat16}
    return {id(p) for name, p in model.named_parameters() if name in cast}
