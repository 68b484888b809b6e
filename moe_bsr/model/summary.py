"""A model in words and numbers before anyone trains it: block by block, and its forward FLOPs.

One multiply-add is two FLOPs, as in torch's counter; much of the ViT literature writes "FLOPs" for one.
"""

from timm.layers import AttentionPoolLatent

from moe_bsr.config import Config
from moe_bsr.model import block
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.plan import token_counts


def counts(model: MultitaskViT) -> list[tuple[int, int]]:
    """(tokens in attention, tokens in FFN) of each block."""
    vit, tokens = model.vit, model.tokens_config
    entering = vit.patch_embed.num_patches + vit.num_prefix_tokens
    return token_counts(model.plan, entering, vit.num_prefix_tokens, tokens.fuses, tokens.protect_fused)


def forward_gflops(model: MultitaskViT) -> float:
    """GFLOPs of one image's forward pass to the logits of one task (the mean over tasks' heads)."""
    vit = model.vit
    embed = vit.patch_embed.num_patches * vit.patch_embed.proj.weight.numel()
    heads = sum(head.weight.numel() for head in model.heads.values()) / len(model.heads)
    blocks = sum(
        block.macs(b, p, n, m, vit.has_class_token)
        for b, p, (n, m) in zip(vit.blocks, model.plan, counts(model), strict=True)
    )
    return 2 * (embed + heads + blocks + pooling_macs(model)) / 1e9


def pooling_macs(model: MultitaskViT) -> int:
    """Of one image's pooling by attention, if there is one: a learned query looks at all tokens, an FFN follows.

    Pooling without parameters (timm's PRR) lets all tokens look at one another.
    """
    vit, pool = model.vit, model.vit.attn_pool
    if pool is None:
        return 0
    tokens = counts(model)[-1][1] - (0 if vit.pool_include_prefix else vit.num_prefix_tokens)
    if not isinstance(pool, AttentionPoolLatent):
        return 2 * tokens * tokens * vit.embed_dim
    of_every_token = pool.kv.weight.numel() + 2 * vit.embed_dim
    of_one = sum(p.numel() for n, p in pool.named_parameters() if p.ndim == 2 and n != "kv.weight")
    return tokens * of_every_token + of_one


def table(model: MultitaskViT, config: Config) -> list[str]:
    """The plan, a line a block: trainable, on the gradient path, tokens in and out, FFN, parameters."""
    lines = ["block  trains  gradient  tokens       FFN                     parameters (trained)"]
    for index, (plan, (n, m)) in enumerate(zip(model.plan, counts(model), strict=True)):
        parameters = list(model.vit.blocks[index].parameters())
        total = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        ffn = (
            f"top-{config.moe.top_k} of {config.moe.num_experts} experts x{config.moe.mlp_ratio}"
            if plan.moe
            else "dense"
        )
        lines.append(
            f"{index:>5}  {'yes' if plan.trainable else '-':<6}  "
            f"{'yes' if index >= model.path_start else '-':<8}  {f'{n} -> {m}' if m < n else n!s:<11}  "
            f"{ffn:<22}  {total:>11,} ({trained:,})"
        )
    return lines


def summary(model: MultitaskViT, config: Config) -> list[str]:
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [
        f"{config.backbone.name} ({config.backbone.weights}), {model.vit.patch_embed.img_size[0]} px, "
        f"{len(model.plan)} blocks; {total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained; "
        f"{forward_gflops(model):.2f} GFLOPs an image forward"
    ]
    if any(error > 1e-4 for error in model.upcycling_errors.values()):
        errors = ", ".join(f"block {i}: {e:.3f}" for i, e in model.upcycling_errors.items())
        lines.append(f"experts start off the pretrained FFN by (relative): {errors}")
    return lines
