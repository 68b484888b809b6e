"""The model: one shared backbone and one linear head per task. The task is an argument of the forward pass.

`backbones/__init__.py` lists the attributes that a backbone must have. The backbone is called `vit` in every
checkpoint, whatever its family. No module keeps state between steps: everything that a caller may need from a forward
pass is in the `Output` it returns.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_bsr.config import Config, ConfigError, require
from moe_bsr.model import adapters, block
from moe_bsr.model.backbones import family_of
from moe_bsr.model.backbones.pretrained import digest
from moe_bsr.model.balance import Balance
from moe_bsr.model.block import Record
from moe_bsr.model.ladder import make_ladder
from moe_bsr.model.layers import Linear, adopt
from moe_bsr.model.merging import spread
from moe_bsr.model.moe import MoE, Routing, upcycle
from moe_bsr.model.plan import freeze, gradient_path, make_plan, require_frozen, stages
from moe_bsr.model.replay import replay_of
from moe_bsr.model.storage import STORAGES
from moe_bsr.model.tokens import Tokens
from moe_bsr.ops.tokens import read_first
from moe_bsr.runtime.rng import generator

HEAD_STD = 0.01


@dataclass(slots=True)
class Output:
    """Result of one forward pass.

    Attributes:
        logits: (B, classes of the task) float32.
        auxiliary_loss: scalar to add to the task's loss (the weighted balance loss; 0 without experts).
        records: by block index, the record of each block that drops, merges or routes.
    """

    logits: Tensor
    auxiliary_loss: Tensor
    records: dict[int, Record] = field(default_factory=dict)

    @property
    def routing(self) -> dict[int, Routing]:
        return {i: r.routing for i, r in self.records.items() if r.routing is not None}


class MultitaskViT(nn.Module):
    """A backbone under a plan, with one head per task. Build it with `build`.

    Attributes:
        plan: one row per block.
        path_start: the first block whose backward pass must run or that depends on the task; the depth if none does.
        trained_tasks: the tasks of `train.only`, or all.
        adapter_parameters: parameters of adapters by block index; some may be frozen.
        ladder: the side network, if the adapter is one.
        replaced: names of frozen backbone parameters whose values differ from the backbone's file.
        log_variances: one scalar per task, if training learns how to weight the losses of the tasks.
        init_from: run, step and sha256 of the weights it started from, if these are from a run.
    """

    def __init__(self, vit: Any, config: Config, classes: dict[str, int], backbone_sha256: str | None = None) -> None:
        """Apply the plan of `config` to `vit` (which is changed in place) and add the heads.

        Args:
            classes: number of classes by task name.
            backbone_sha256: digest of the backbone as loaded from its file, if `vit` was changed since.
        """
        super().__init__()
        self.vit = vit
        self.family = family_of(config.backbone)
        self.image_size = self.family.image_side(vit)
        if backbone_sha256 is None:
            backbone_sha256 = "" if next(vit.parameters()).is_meta else digest(vit.state_dict())
        self.backbone_sha256 = backbone_sha256
        self.replaced: set[str] = set()
        self.init_from: dict[str, Any] | None = None
        self.tokens_config = config.tokens
        self.plan = make_plan(config, len(vit.blocks))
        self.family.check(config, self.plan)
        self.tasks = list(classes)
        reserved = sorted(set(classes) & {*dir(nn.ModuleDict()), *dir(nn.ParameterDict())})
        require(not reserved, "tasks", reserved, "attributes of torch modules cannot name a task: rename its file")
        for layer in vit.blocks:
            adopt(layer)
        self.upcycling_errors = upcycle(vit.blocks, config, self.tasks)
        freeze(vit, config.plan)
        if not config.moe.learns_routers:
            for index in config.plan.moe_blocks:
                vit.blocks[index].mlp.router.requires_grad_(False)
        self.adapter_parameters = adapters.attach(vit.blocks, [each.adapter for each in self.plan], config.seed)
        self.ladder = make_ladder(vit, self.plan, config)
        if self.ladder is not None:
            self.adapter_parameters = self.ladder.parameters_by_block()
        self.balance = Balance(config.moe, self.tasks, sorted(config.plan.moe_blocks))
        self.head_blocks = sorted(config.plan.head_blocks)
        why = f"must be []: {config.backbone.name} has no class token that heads could read"
        require(vit.has_class_token or not self.head_blocks, "plan.head_blocks", self.head_blocks, why)
        width = vit.num_features + len(self.head_blocks) * vit.embed_dim
        self.heads = nn.ModuleDict({task: nn.Linear(width, n) for task, n in classes.items()})
        for task, head in self.heads.items():
            noise = torch.randn(head.weight.shape, generator=generator(config.seed, "head", task))
            head.weight.data.copy_(HEAD_STD * noise)
            nn.init.zeros_(head.bias)
        learned = self.tasks if config.train.task_weighting == "uncertainty" else []
        self.log_variances = nn.ParameterDict({task: nn.Parameter(torch.zeros(())) for task in learned})
        self.contexts = block.contexts(vit, self.plan, config.tokens)
        self._own = self._unchanged_by_plan()
        self.trained_tasks = self.tasks if config.train.only is None else config.train.only
        if config.train.only is not None:
            self._train_only(config.train.only)
        self._stages = stages(vit)
        self.embedding_trains, first = gradient_path(self._stages)
        # Experts depend on the task, and the blocks before the path must not.
        self.path_start = min([first, *config.plan.moe_blocks])

    def forward(self, images: Tensor, task: str, noise_key: tuple[int, ...] | None = None) -> Output:
        """Compute logits for (B, 3, S, S) normalized images of one task.

        Args:
            noise_key: integers that seed the gate noise (training with moe.gate_noise > 0 needs it).
        """
        return self._forward_path([self.forward_features(images, task)], task, noise_key)

    def forward_features(
        self, images: Tensor, task: str = "", upto: int | None = None
    ) -> tuple[Tokens, dict[int, Record]]:
        """Run the embedding and the blocks before the gradient path, without a graph.

        There is a graph if the embedding trains, or if the images require a gradient, as for a saliency map.

        The result serves every task: `for task in tasks: model.forward_from(tokens, task)`.

        Args:
            images: (B, 3, S, S), normalized.
            upto: run the blocks before this one instead.
        Returns:
            The tokens that enter the next block, and the records of blocks that drop or merge tokens.
        """
        if not images.is_floating_point():
            raise TypeError(f"images are {images.dtype}: normalize them first, as by run.transforms.normalize")
        if torch.is_grad_enabled() and not self.embedding_trains:
            require_frozen(self, self._stages[: self.path_start + 1])
        with torch.set_grad_enabled(torch.is_grad_enabled() and (self.embedding_trains or images.requires_grad)):
            tokens = self.family.embed(self.vit, images)
            records: dict[int, Record] = {}
            for index in range(self.path_start if upto is None else upto):
                tokens = self.run_block(index, tokens, task, None, records)
        return tokens, records

    def forward_from(
        self,
        tokens: Tokens,
        task: str,
        noise_key: tuple[int, ...] | None = None,
        records: dict[int, Record] | None = None,
    ) -> Output:
        """Run the gradient path and the head of `task` on the tokens that `forward_features` returned."""
        return self._forward_path([(tokens, dict(records or {}))], task, noise_key)

    def features_from(self, tokens: Tokens, task: str, start: int | None = None) -> Tensor:
        """Return what the head of `task` reads, (B, D) float32, for the tokens of `forward_features(upto=start)`."""
        for index in range(self.path_start if start is None else start, len(self.plan)):
            tokens = self.run_block(index, tokens, task)
        return self.features(tokens)

    def _forward_path(
        self, start: list[tuple[Tokens, dict[int, Record]]], task: str, noise_key: tuple[int, ...] | None
    ) -> Output:
        # The tokens come in a list that is emptied here. As a plain argument, the caller's frame would keep them alive
        # until the end of the pass.
        tokens, records = start.pop()
        if task not in self.heads:
            raise ValueError(f"no task {task!r}: this model has {', '.join(self.tasks)}")
        for index in range(self.path_start, len(self.plan)):
            key = None if noise_key is None else (*noise_key, index)
            tokens = self.run_block(index, tokens, task, key, records)
        output = Output(self.logits(tokens, task), tokens.x.new_zeros(()), records)
        output.auxiliary_loss = self.balance(output.routing, task)
        return output

    def run_block(
        self,
        index: int,
        tokens: Tokens,
        task: str,
        noise_key: tuple[int, ...] | None = None,
        records: dict[int, Record] | None = None,
    ) -> Tokens:
        """Run block `index`; if gradients are enabled, under its storage.

        Args:
            noise_key: as in `forward`, with the block's index appended.
            records: the block's record is added here if it drops, merges or routes.
        """
        layer, context, replay, before = self.vit.blocks[index], self.contexts[index], replay_of(index), tokens

        def run(tokens: Tokens, needs_output: bool = True) -> tuple[Tokens, Record]:
            return self.family.forward(layer, tokens, context, task, replay, noise_key, needs_output)

        if torch.is_grad_enabled():
            storage = context.plan.storage
            tokens, record = STORAGES[storage.kind].run(run, tokens, list(layer.parameters()), storage.options)
        else:
            tokens, record = run(tokens)
        self.collect_class_token(index, before, tokens)
        if self.ladder is not None:
            tokens = self.ladder.pass_by(index, before, tokens, record.dropped, replay)
        if records is not None and (record.dropped is not None or record.routing is not None):
            records[index] = record
        return tokens

    def collect_class_token(self, index: int, before: Tokens, after: Tokens) -> None:
        """Pass on the class tokens collected so far, and append block `index`'s if heads read it.

        `after.x` is replaced then, so that the gradients of its two uses meet in one tensor.
        """
        after.class_tokens = before.class_tokens
        if index in self.head_blocks:
            after.x, own = read_first(after.x)
            after.class_tokens = own if before.class_tokens is None else torch.cat([before.class_tokens, own], 1)

    def logits(self, tokens: Tokens, task: str) -> Tensor:
        """Apply the head of `task` to the last block's tokens: (B, classes) float32."""
        return self.classify(self.features(tokens), task)

    def classify(self, features: Tensor, task: str) -> Tensor:
        """Apply the head of `task` to features (B, D): (B, classes) float32."""
        # In float32, because bf16 logits of a hundred classes have ties, which change the accuracy.
        with torch.autocast(features.device.type, enabled=False):
            return self.heads[task](features)

    def features(self, tokens: Tokens) -> Tensor:
        """Return what heads read: pooled features of the last block, then those of `head_blocks`, (B, D) float32."""
        x = tokens.x if self.vit.global_pool == "token" else spread(tokens)
        if self.ladder is not None:
            x = self.ladder(tokens, [each.plan.storage for each in self.contexts])
        features = self.family.pool(self.vit, x).float()
        return features if tokens.class_tokens is None else torch.cat([features, tokens.class_tokens.float()], 1)

    def features_key(self, upto: int | None = None) -> tuple:
        """Return a key of the frozen blocks before `upto`. Models with equal keys can share `forward_features`."""
        upto = self.path_start if upto is None else upto
        before, own = self.plan[:upto], upto > self.path_start or self.embedding_trains or self.replaced
        if own or any(block.trainable or block.adapter for block in before):
            return (id(self),)
        read = [index for index in self.head_blocks if index < upto]
        return self.backbone_sha256, upto, repr(([b.keep_rate for b in before], read, self.tokens_config))

    def cast_frozen_(self, dtype: torch.dtype) -> None:
        """Convert frozen weight matrices to the compute dtype, which gives the values that autocast would compute with.

        Matrices that an earlier run trained stay in float32, as that run saved them.
        """
        kept = {id(p) for name, p in self.named_parameters() if name in self._own}
        layers = [layer for layer in self.vit.modules() if type(layer) in (Linear, nn.Conv2d)]
        for parameter in (p for layer in layers for p in layer.parameters(recurse=False) if id(p) in kept):
            parameter.data = parameter.data.to(dtype)

    def commit(self, output: Output, task: str) -> None:
        """Add a training micro-batch to the running statistics. Call it once per micro-batch."""
        if output.routing:
            self.balance.update(output.routing, task)

    def layers(self) -> dict[int, int]:
        """Return the layer of each parameter, by id, for layer-wise learning rates.

        Layer 0 has the embeddings, layer i + 1 block i with its experts and adapters, and layer depth + 1 the routers,
        the final norm, the heads and the log variances.
        """
        vit, found = self.vit, {id(p): 0 for p in self.parameters()}
        top = [vit.norm, vit.fc_norm, vit.attn_pool, self.heads, self.log_variances]
        for index, layer in enumerate(vit.blocks):
            found |= {id(p): index + 1 for p in layer.parameters()}
        top += [moe.router for moe in self.mixtures()]
        found |= {id(p): i + 1 for i, added in self.adapter_parameters.items() for p in added}
        return found | {id(p): len(self.plan) + 1 for module in top if module is not None for p in module.parameters()}

    def mixtures(self) -> list[MoE]:
        """Return the MoE layers in the order of their blocks."""
        return [self.vit.blocks[index].mlp for index in self.balance.blocks]

    def parameters_of(self, task: str) -> list[nn.Parameter]:
        """Return the parameters that a step of `task` uses: all but other tasks' heads, routers and log variances."""
        others = {id(p) for name, head in self.heads.items() if name != task for p in head.parameters()}
        others |= {id(p) for name, p in self.log_variances.items() if name != task}
        others |= {id(p) for moe in self.mixtures() for p in moe.router.parameters_of_others(task)}
        return [p for p in self.parameters() if id(p) not in others]

    def own_parameters(self, task: str) -> list[nn.Parameter]:
        """Return the parameters that only steps of `task` use: its head, and its routers if each task has its own."""
        shared = {id(p) for p in self.parameters_of("")}
        return [p for p in self.parameters_of(task) if id(p) not in shared]

    def _train_only(self, tasks: list[str]) -> None:
        """Freeze all parameters except those that belong to these tasks alone."""
        trained = [p for task in tasks for p in self.own_parameters(task) if p.requires_grad]
        self.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)

    def unchanged_backbone_names(self) -> set[str]:
        """Return the state dict's names whose values equal the backbone's file. They need not be saved again."""
        return self._own - self.replaced

    def _unchanged_by_plan(self) -> set[str]:
        new = {id(t) for moe in self.mixtures() for t in (*moe.parameters(), *moe.buffers())}
        new |= {id(p) for added in self.adapter_parameters.values() for p in added}
        tensors = (*self.vit.named_parameters(), *self.vit.named_buffers())
        return {f"vit.{name}" for name, t in tensors if not t.requires_grad and id(t) not in new}


def build_on_meta(config: Config, classes: dict[str, int]) -> MultitaskViT:
    """Build the model on the meta device, which is instant. This makes all checks that need no weights."""
    return MultitaskViT(family_of(config.backbone).create_on_meta(config.backbone), config, classes)


def build(
    config: Config, classes: dict[str, int], change: Callable[[Any, str], None] | None = None, checked: bool = False
) -> MultitaskViT:
    """Build the model on the CPU in float32. The configuration is checked before weights are read.

    Args:
        change: called with the loaded backbone and its sha256, before the plan is applied; it may replace weights.
        checked: whether the caller has checked the configuration with `build_on_meta`.
    Raises:
        ConfigError: impossible plan, unknown backbone, weights that do not fit it, or too little memory.
    """
    if not checked:
        build_on_meta(config, classes)
    try:
        vit = family_of(config.backbone).load(config.backbone, config.seed)
        sha256 = digest(vit.state_dict())
        if change is not None:
            change(vit, sha256)
        return MultitaskViT(vit, config, classes, sha256)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        size = sum(parameter.numel() for parameter in build_on_meta(config, classes).parameters())
        raise ConfigError(
            f"not enough memory for the {4 * size / 2**20:,.0f} MB of this model's parameters: take fewer "
            "moe.num_experts or plan.moe_blocks, or a smaller backbone.name"
        ) from None
