"""FLOPs in closed form, attention, routers and experts counted; a multiply-add is two.

The backward of a product y = x W costs as much again for dx, where the gradient path goes on, and once
more for dW, where W trains. Elementwise work (norms, softmax, activations) is not counted, as everywhere.
"""

from moe_bsr.model import block
from moe_bsr.model import summary as describe
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.storage import STORAGES


def forward_flops(model: MultitaskViT) -> int:
    """Of one image's forward pass to the logits of one task (the mean over tasks' heads)."""
    return round(1e9 * describe.forward_gflops(model))


def step_flops(model: MultitaskViT) -> int:
    """Of one image in a training step: forward, backward where it must run, recomputation if any.

    Pooling by attention is left out: `predict` refuses a backbone that has it.
    """
    vit = model.vit
    embed = vit.patch_embed.num_patches * vit.patch_embed.proj.weight.numel()
    heads = sum(head.weight.numel() for head in model.heads.values()) / len(model.heads)
    path = model.path_start < len(vit.blocks)
    total = embed * (1 + model.embedding_trains) + heads * (2 + path)
    for index, (layer, plan, (n, m)) in enumerate(zip(vit.blocks, model.plan, describe.counts(model), strict=True)):
        forward = block.macs(layer, plan, n, m, vit.has_class_token)
        total += forward
        if index < model.path_start:
            continue
        products, of_weights = block.backward_macs(layer, plan, n, m, vit.has_class_token, model.tokens_config.attached)
        total += products + of_weights
        if STORAGES[model.storages[index]].again:
            total += forward - block.skipped_macs(layer, m)
    return round(2 * total)
