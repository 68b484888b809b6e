"""What a training step of this code truly holds, predicted from shapes alone.

`predict` adds up what the parts state of themselves: parameters, run-time copies, gradients and optimizer
state by counting, activations and transients by playing every part's `*_bytes` through a ledger in the
order of a step. The network is never run; a model on the meta device will do.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from moe_bsr.config import Config, require
from moe_bsr.cost.flops import forward_flops, step_flops
from moe_bsr.cost.ledger import INDEX, ROW, Held, Ledger, norm_bytes
from moe_bsr.model import summary as describe
from moe_bsr.model.block import block_bytes, unstated
from moe_bsr.model.moe import MoE
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.storage import STORAGES
from moe_bsr.ops.experts import is_grouped
from moe_bsr.ops.linear import frozen_matrices, linear_bytes
from moe_bsr.runtime.device import find_device

THREADS = 2  # whose scratch is counted; it is small beside everything else


@dataclass(slots=True)
class Cost:
    """Bytes and FLOPs of one micro-batch's training step and the update after it.

    Attributes:
        parameters: weights and buffers as they are kept while training (frozen matrices in the compute dtype).
        copies: of trained weights in the compute dtype, alive from the forward to the backward; part of `kept`.
        gradients, optimizer: at the end of the backward and from the first update on.
        average: the copy of the trained parameters that `train.ema_decay` keeps.
        kept: for the backward pass. kept_by_block: the same by section and kind.
        transients: most bytes alive in forward, backward and optimizer over what lived before the step,
            `kept` included, gradients not.
        peak: of everything but the images and what `data.feature_cache_mb` keeps of them.
        forward_flops, step_flops: of the micro-batch; two for a multiply-add.
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

    def summary(self, batch: int) -> str:
        """In one line, for a person who starts a run with these micro-batches."""
        return (
            f"predicted: {self.peak / 2**20:.0f} MB of tensors at the peak of a step ({self.kept / 2**20:.0f} MB kept "
            f"for backward), {self.step_flops / batch / 1e9:.2f} GFLOPs an image to train"
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
) -> Cost:
    """The cost of training steps of one task's micro-batches of `batch` images.

    Args:
        model: on any device, `plan_only`'s included. precision: "fp32" or "bf16".
        task: by default the one with the most classes.
        all_tasks: as in a run in which every task had its turn: optimizer state of all heads and routers, with
            joint sampling their gradients, and at the peak what earlier micro-batches of an update left.
        shares: by block with experts, the largest expert's group over an equal one, once it is known: values decide it.
    Raises:
        ConfigError: a part of the backbone, or the experts' engine, trains but states no cost.
    """
    size = 2 if precision == "bf16" else 4
    on_gpu = find_device(config.runtime.device).type == "cuda"  # the model may be on the meta device
    grouped = is_grouped(config.moe.backend, on_gpu, precision == "bf16")
    require(
        not (grouped and config.plan.moe_blocks),
        "moe.backend",
        config.moe.backend,
        "grouped products state no cost; use loop, or auto on a CPU",
    )
    parts = _unstated(model)
    require(
        not parts,
        "backbone.name",
        config.backbone.name,
        f"states no cost for its {', '.join(parts)}: such a "
        "backbone trains but cannot be costed; take one as plain as deit_small_patch16_224",
    )
    classes = model.heads[task].out_features if task else max(h.out_features for h in model.heads.values())
    trained = [p for p in _active(model, task) if p.requires_grad]
    stepped = [p for p in model.parameters() if p.requires_grad] if all_tasks else trained
    if all_tasks and config.sampler.kind == "joint":
        trained = stepped
    gradients = sum(p.numel() for p in trained) * ROW
    known = {model.vit.blocks[index].mlp: share for index, share in (shares or {}).items()}
    forward, backward, kept, reported = _play(Ledger(size, THREADS, known), model, batch, classes)
    total = sum(sum(kinds.values()) for kinds in kept.values())
    parameters = _weights(model, size)
    optimizer = _state(stepped, config)
    average = (
        0 if config.train.ema_decay is None else sum(p.numel() for p in model.parameters() if p.requires_grad) * ROW
    )
    transients = {"forward": forward, "backward": backward, "optimizer": _update(trained, config)}
    earlier = _micro_batches(model, config) - 1 if all_tasks else 0
    _, beside, _, _ = _play(Ledger(size, THREADS, known), model, batch, classes, "more" if earlier else "first")
    if earlier:
        largest = max(forward, beside, transients["optimizer"]) + gradients + earlier * reported
    else:
        outside = gradients - sum(_gradients(block) for block in model.vit.blocks)  # of the head, the last norm ...
        largest = max(forward, beside + max(outside, 0), transients["optimizer"] + gradients)
    return Cost(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        average=average,
        kept=total,
        copies=sum(kinds.get("weight copies", 0) for kinds in kept.values()),
        kept_by_block=kept,
        transients=transients,
        peak=parameters + optimizer + average + largest,
        forward_flops=batch * forward_flops(model),
        step_flops=batch * step_flops(model),
    )


def _play(
    ledger: Ledger, model: MultitaskViT, batch: int, classes: int, gradients: str = "apart"
) -> tuple[int, int, dict[str, dict[str, int]], int]:
    """Peak bytes of the forward and of the backward, what is kept between them, and what the output holds.

    Args:
        gradients: "apart", not counted; "first", a block's appear as its backward begins; "more", there are some
            already, beside which a block's new ones are made and added to them.
    """
    vit, counts = model.vit, describe.counts(model)
    width, tokens, size = vit.embed_dim, counts[0][0], ledger.size
    stream, side = batch * tokens * width, vit.patch_embed.img_size[0]
    records: list[Held] = []
    tape = []

    ledger.section, ledger.tokens = "embedding", tokens
    ledger.grad = model.embedding_trains
    pixels = batch * 3 * side * side
    laid_out = ledger.make(0 if size == 4 else pixels * ROW)
    images = ledger.make(0 if size == 4 else pixels * size)  # in float32 the caller's own
    ledger.free(laid_out)
    patches, of_embedding = linear_bytes(
        ledger, vit.patch_embed.proj, images, batch * vit.patch_embed.num_patches, False
    )
    ledger.free(images)
    joined, placed = ledger.make(stream * ROW), None
    ledger.free(patches)
    placed = ledger.make(stream * ROW)
    ledger.free(joined)
    x = placed if size == 4 else ledger.make(stream * size)
    if x is not placed:
        ledger.free(placed)
    origin = ledger.make(tokens * INDEX, packable=False)

    for index, (block, plan, (before, after)) in enumerate(zip(vit.blocks, model.plan, counts, strict=True)):
        ledger.section = f"block {index}"
        ledger.grad = index >= model.path_start
        needs_x = index > model.path_start or model.embedding_trains

        def part(x: Held, block=block, plan=plan, before=before, after=after, needs_x=needs_x):
            return block_bytes(
                ledger, block, plan, model.tokens_config, x, batch, before, after, vit.num_prefix_tokens, needs_x
            )

        storage = STORAGES[model.storages[index]] if ledger.grad else STORAGES["exact"]
        out, held, back = storage.cost(ledger, part, x)
        records += held
        ledger.free(x)
        x = out
        if ledger.grad:
            made = {"apart": 0, "first": _gradients(block), "more": _made_at_once(block, storage.again)}[gradients]
            tape.append((back, made))

    ledger.section = "head"
    ledger.grad = model.path_start < len(vit.blocks)
    looked_at = 1 if vit.global_pool == "token" else counts[-1][1]
    final, of_norm = norm_bytes(ledger, vit.norm, x, batch * looked_at, width, ledger.grad)
    ledger.grad = True
    features = ledger.make(batch * width * ROW, packable=False)
    ledger.save(features, "features")
    logits = ledger.make(batch * classes * ROW, packable=False)
    ledger.save(logits, "logits")
    ledger.free(x, features, logits)
    if not tape:
        ledger.free(final)
    forward = ledger.peak
    kept = {section: dict(kinds) for section, kinds in ledger.kept.items()}

    ledger.peak = ledger.live
    ledger.scratch(2 * batch * classes * ROW)
    ledger.release(logits)
    ledger.release(features)
    if tape:
        grad = ledger.make(batch * looked_at * width * size)
        ledger.free(final)
        ledger.free(of_norm(grad))
        grad = ledger.make(batch * counts[-1][1] * width * size)
        while tape and grad is not None:
            back, size_of_new = tape.pop()
            new = ledger.make(size_of_new)
            grad = back(grad)
            if gradients == "more":
                ledger.free(new)
        if grad is not None:  # back through the sum with the position embeddings, in float32
            of_patches = ledger.make(stream * ROW)
            ledger.scratch(0 if size == 4 else stream * size)
            of_embedding(of_patches)
    ledger.free(origin, *records)
    return forward, ledger.peak, kept, sum(record.bytes for record in records) + logits.bytes


def _gradients(block: nn.Module) -> int:
    return sum(p.numel() for p in block.parameters() if p.requires_grad) * ROW


def _made_at_once(block: nn.Module, again: bool) -> int:
    """Bytes of the gradients a block's backward makes before any is added to what an earlier one left: all if the
    block runs again, else those of a layer: of all experts together, or of one matrix."""
    if again:
        return _gradients(block)
    if isinstance(block.mlp, MoE):
        return sum(p.numel() for p in block.mlp.experts.parameters() if p.requires_grad) * ROW
    return max((p.numel() for p in block.parameters() if p.requires_grad), default=0) * ROW


def _micro_batches(model: MultitaskViT, config: Config) -> int:
    """How many go into one update."""
    return config.train.grad_accumulation_steps * (len(model.tasks) if config.sampler.kind == "joint" else 1)


def _unstated(model: MultitaskViT) -> list[str]:
    """The parts that run but of which nobody here says what they allocate."""
    vit = model.vit
    parts = {
        name
        for block, plan in zip(vit.blocks, model.plan, strict=True)
        for name in unstated(block, plan, vit.has_class_token)
    }
    kinds = {
        "norm before the blocks": isinstance(vit.norm_pre, nn.Identity),
        "norm of the patches": isinstance(vit.patch_embed.norm, nn.Identity),
        "norm after pooling": isinstance(vit.fc_norm, nn.Identity),
        "pooling by attention": vit.attn_pool is None,
        "want of a final norm": isinstance(vit.norm, nn.LayerNorm) or isinstance(vit.fc_norm, nn.LayerNorm),
    }
    return sorted(parts) + [name for name, stated in kinds.items() if not stated]


def _active(model: MultitaskViT, task: str | None) -> list[nn.Parameter]:
    """Parameters that take part in a step of one task: not the other tasks' heads and routers."""
    task = task or max(model.tasks, key=lambda name: model.heads[name].out_features)
    others = [t for t in model.tasks if t != task]
    away = tuple(f"heads.{t}." for t in others)
    routers = tuple(f".router.weight.{t}" for t in others)
    return [p for n, p in model.named_parameters() if not n.startswith(away) and not n.endswith(routers)]


def _weights(model: MultitaskViT, size: int) -> int:
    narrow = {id(p) for p in frozen_matrices(model.vit)} if size == 2 else set()
    return sum(p.numel() * (2 if id(p) in narrow else ROW) for p in model.parameters()) + sum(
        b.numel() * b.element_size() for b in model.buffers()
    )


def _state(trained: list[nn.Parameter], config: Config) -> int:
    """AdamW: two moments and a step count for each parameter that ever had a gradient; SGD: momentum."""
    if config.train.optimizer == "sgd":
        return sum(p.numel() for p in trained) * ROW if config.train.momentum else 0
    return sum(2 * p.numel() + 1 for p in trained) * ROW


def _update(trained: list[nn.Parameter], config: Config) -> int:
    """Clipping takes one norm a parameter; SGD with weight decay one parameter's size."""
    if config.train.optimizer == "sgd" and config.train.weight_decay:
        return max((p.numel() for p in trained), default=0) * ROW
    return 0
