"""Trace the sections of one model's training step, each kind once per process. `predict.py` puts them together."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Hashable, Iterator
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
from moe_bsr.cost.timeline import Placed
from moe_bsr.cost.update_section import Update, trace_update
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runtime import cpu_features as cpu
from moe_bsr.runtime.device import Runtime, find_device

MAX_SECTIONS = 10_000
_sections: dict[Hashable, Any] = {}
"""All traces of this process. A key holds everything that a trace depends on."""


class Step:
    """Sections of one model's training step. Sections of the same kind share one trace.

    Attributes:
        trained: names of the parameters that have a gradient so far.
        key: the settings on which every trace depends, hashable.
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
        train = config.train
        moves = not self.setting.differentiates or (
            train.step_in_backward and (train.optimizer, train.momentum, train.grad_clip_norm, train.grad_clip_per)
        )
        self.key = (batch, device, precision, threads, scratch, kernels, repr(config.tokens), moves)

    def _share(self, index: int) -> float:
        moe = self.setting.config.moe
        return self.shares.get(index) or largest_share(self.model.vit.embed_dim, moe.num_experts, moe.top_k)

    def places(self, task: str, blocks: int | None = None) -> list[Placed]:
        """Return the sections of one micro-batch of a task, and add the parameters they train to `trained`.

        Args:
            blocks: return only the embedding and this many blocks. None: all blocks and the head.
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
                index in model.head_blocks,
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
        """Return the trace of a section, from the cache if an equal one exists.

        Args:
            prefix: in the model, of the names of the modules' parameters.
            about: hashable; everything besides the modules and `key` that the trace depends on.
        """
        place = kind, prefix, task
        if place not in self._fingerprints:
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
        """Return the bytes of the weights that a gradient-free step copies, perturbs and restores; otherwise 0."""
        if self.setting.differentiates:
            return 0
        return sum(p.nbytes for p in self.model.parameters_of(task) if p.requires_grad)

    def update(self, stepped: set[str]) -> Update:
        """Return the traced optimizer update. Models that differ only in which blocks train share one trace.

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
    """Return the device of a run, which this machine need not have. "auto" is the best one that it has.

    Raises:
        ConfigError: there is no such kind of device.
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
    """Context in which the model is in training mode and its norms are as `Runtime.place` sets them."""
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
    """Return the ids of the parameters that `cast_frozen_` keeps only in the compute dtype."""
    with standing_in(dict(model.named_modules()), lambda tensor: tensor.new_empty(0, device="cpu")) as parameters:
        model.cast_frozen_(torch.bfloat16)
        cast = {name for name, parameter in parameters.items() if parameter.dtype == torch.bfloat16}
    return {id(p) for name, p in model.named_parameters() if name in cast}
