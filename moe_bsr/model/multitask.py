"""The model: one shared backbone, one linear head per task; the task is an argument of the forward.

No module keeps the state of a step: everything a caller may want to know of a forward pass is in the
`Output` it returns.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from moe_bsr.config import Config
from moe_bsr.model import block
from moe_bsr.model.backbones import vit as backbone
from moe_bsr.model.balance import Balance
from moe_bsr.model.moe import MoE, upcycling_error
from moe_bsr.model.plan import block_storages, embedding_trains, freeze, gradient_path_start, make_plan
from moe_bsr.model.replay import Replay
from moe_bsr.model.storage import STORAGES
from moe_bsr.model.tokens import Tokens
from moe_bsr.ops.linear import compute_dtype, embed_patches, frozen_matrices
from moe_bsr.runtime.rng import generator


@dataclass(slots=True)
class Output:
    """Result of one forward pass.

    Attributes:
        logits: (B, classes of the task) float.
        auxiliary_loss: scalar to add to the task's loss (the weighted balance loss; 0 without experts).
        records: what each block that drops or routes did, by block index.
    """

    logits: Tensor
    auxiliary_loss: Tensor
    records: dict[int, block.Record] = field(default_factory=dict)

    @property
    def routing(self) -> dict:
        return {i: r.routing for i, r in self.records.items() if r.routing is not None}


class MultitaskViT(nn.Module):
    """A planned backbone with heads. Build it with `build`."""

    def __init__(self, vit: VisionTransformer, config: Config, classes: dict[str, int]) -> None:
        """Apply the plan of `config` to `vit` (which is changed in place) and add the heads.

        Args:
            classes: number of classes by task name.
        """
        super().__init__()
        self.vit = vit
        self.backbone_sha256 = backbone.digest(vit.state_dict()) if _has_values(vit) else ""
        self.tokens_config = config.tokens
        self.plan = make_plan(config.plan, len(vit.blocks))
        self.storages = block_storages(config.storage, len(vit.blocks))
        self.tasks = list(classes)
        self.upcycling_errors: dict[int, float] = {}
        for index in config.plan.moe_blocks:
            mlp = vit.blocks[index].mlp
            moe = MoE(mlp, config.moe, self.tasks, seed=(config.seed, "block", index))
            if _has_values(vit):
                self.upcycling_errors[index] = upcycling_error(moe, mlp, vit.blocks[index].norm2, self.tasks[0])
            vit.blocks[index].mlp = moe
        freeze(vit, config.plan)
        if not config.moe.train_router:
            for index in config.plan.moe_blocks:
                vit.blocks[index].mlp.router.requires_grad_(False)
        self.balance = Balance(config.moe, self.tasks, sorted(config.plan.moe_blocks))
        self.heads = nn.ModuleDict({task: nn.Linear(vit.num_features, n) for task, n in classes.items()})
        for task, head in self.heads.items():
            noise = torch.randn(head.weight.shape, generator=generator(config.seed, "head", task))
            head.weight.data.copy_(0.01 * noise)
            nn.init.zeros_(head.bias)
        self.embedding_trains = embedding_trains(vit)
        self.path_start = gradient_path_start(vit)

    def forward(
        self,
        images: Tensor | None,
        task: str,
        noise_key: tuple[int, ...] | None = None,
        forward_features: Callable[[Tensor | None, str], tuple[Tokens, dict[int, block.Record]]] | None = None,
    ) -> Output:
        """(B, 3, S, S) normalized images of one task -> its logits and what happened on the way.

        Args:
            noise_key: integers that seed the gate noise (training with moe.gate_noise > 0 needs it).
            forward_features: takes the place of `self.forward_features`; only one that needs no images may be given None.
        """
        return self._finish([(forward_features or self.forward_features)(images, task)], task, noise_key)

    def forward_features(self, images: Tensor, task: str = "") -> tuple[Tokens, dict[int, block.Record]]:
        """Everything before the gradient path, under no_grad: the same for every task.

        One call serves all tasks: `for task in tasks: model.forward_from(tokens, task)`.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.embedding_trains):
            tokens = self._embed(images)
            records: dict[int, block.Record] = {}
            for index in range(self.path_start):
                tokens = self._block(index, tokens, task, None, records)
        return tokens, records

    def forward_from(
        self,
        tokens: Tokens,
        task: str,
        noise_key: tuple[int, ...] | None = None,
        records: dict[int, block.Record] | None = None,
    ) -> Output:
        """The gradient path and the head of `task`, from the tokens `forward_features` returned."""
        return self._finish([(tokens, dict(records or {}))], task, noise_key)

    def _embed(self, images: Tensor) -> Tokens:
        vit = self.vit
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(embed_patches(vit.patch_embed, images))))
        origin = torch.arange(x.shape[1] - vit.num_prefix_tokens, device=x.device)
        return Tokens(x.to(compute_dtype(x)), origin.expand(len(x), -1))

    def _finish(
        self, start: list[tuple[Tokens, dict[int, block.Record]]], task: str, noise_key: tuple[int, ...] | None
    ) -> Output:
        tokens, records = start.pop()  # in a list, or the caller's frame would hold the tokens to the end
        for index in range(self.path_start, len(self.plan)):
            key = None if noise_key is None else (*noise_key, index)
            tokens = self._block(index, tokens, task, key, records)
        output = Output(self.logits(tokens, task), None, records)
        output.auxiliary_loss = self.balance(output.routing, task)
        return output

    def logits(self, tokens: Tokens, task: str) -> Tensor:
        """The head of `task` on the last block's tokens: (B, classes) float32."""
        # Only the class token is looked at: no need to normalize the others.
        x = tokens.x[:, :1] if self.vit.global_pool == "token" else tokens.x
        features = self.vit.forward_head(self.vit.norm(x), pre_logits=True)
        # In float32: bf16 logits of a hundred classes tie, and ties decide about accuracy.
        with torch.autocast(features.device.type, enabled=False):
            return self.heads[task](features.float())

    def features_key(self) -> tuple:
        """Models with equal keys have the same frozen blocks: the features of one serve the others."""
        if self.embedding_trains:
            return (id(self),)
        return self.backbone_sha256, self.path_start, tuple(self.plan[: self.path_start])

    def cast_frozen_(self, dtype: torch.dtype) -> None:
        """Keep the frozen matrices in the compute dtype alone: the values autocast would compute with."""
        for parameter in frozen_matrices(self.vit):
            parameter.data = parameter.data.to(dtype)

    def commit(self, output: Output, task: str) -> None:
        """Fold a training micro-batch into the running statistics; once per micro-batch."""
        if output.routing:
            self.balance.update(output.routing, task)

    def unchanged_backbone_names(self) -> set[str]:
        """Names in the state dict that are the backbone's own, unchanged: not worth saving again."""
        experts = tuple(f"blocks.{i}.mlp." for i, plan in enumerate(self.plan) if plan.moe)
        return {
            f"vit.{name}"
            for name, p in self.vit.named_parameters()
            if not p.requires_grad and not name.startswith(experts)
        }

    def _block(
        self, index: int, tokens: Tokens, task: str, noise_key: tuple[int, ...] | None, records: dict[int, block.Record]
    ) -> Tokens:
        run = partial(
            block.forward,
            self.vit.blocks[index],
            plan=self.plan[index],
            config=self.tokens_config,
            prefix=self.vit.num_prefix_tokens,
            has_class_token=self.vit.has_class_token,
            task=task,
            replay=Replay(),
            noise_key=noise_key,
        )
        if torch.is_grad_enabled():
            parameters = list(self.vit.blocks[index].parameters())
            tokens, record = STORAGES[self.storages[index]].run(run, tokens, parameters)
        else:
            tokens, record = run(tokens)
        if record.dropped is not None or record.routing is not None:
            records[index] = record
        return tokens


def _has_values(vit: VisionTransformer) -> bool:
    return vit.patch_embed.proj.weight.device.type != "meta"


def build_on_meta(config: Config, classes: dict[str, int]) -> MultitaskViT:
    """The model without values, on the meta device: instant, checks everything that needs no weights."""
    return MultitaskViT(backbone.create_on_meta(config.backbone), config, classes)


def build(config: Config, classes: dict[str, int]) -> MultitaskViT:
    """A model as the configuration says, on the CPU in float32; checked before weights are read.

    Raises:
        ConfigError: impossible plan, unknown backbone, or weights that do not fit it.
    """
    build_on_meta(config, classes)
    return MultitaskViT(backbone.load(config.backbone, config.seed), config, classes)
