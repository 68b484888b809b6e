"""A model in words and numbers before anyone trains it, block by block. What it costs is cost/'s business."""

from moe_bsr.config import Config
from moe_bsr.model.adapters import is_beside
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.plan import token_counts


def counts(model: MultitaskViT) -> list[tuple[int, int]]:
    """(tokens in attention, tokens in FFN) of each block of a Vision Transformer."""
    vit, tokens = model.vit, model.tokens_config
    entering = vit.patch_embed.num_patches + vit.num_prefix_tokens
    return token_counts(model.plan, entering, vit.num_prefix_tokens, tokens.fuses, tokens.protect_fused)


def table(model: MultitaskViT, config: Config) -> list[str]:
    """The plan, a line a block: what it is, whether its backward pass runs, and its parameters."""
    full = f" experts x{config.moe.mlp_ratio}" if config.moe.experts == "full" else ""
    experts = f"{config.moe.words}{full}"
    maps = model.vit.maps() if hasattr(model.vit, "maps") else []
    tokens = [] if maps else counts(model)
    what = ["maps"] if maps else ["tokens", "FFN", "adapter"]
    rows = [("block", "trains", "gradient", *what, "storage", "parameters (trained)")]
    for index, plan in enumerate(model.plan):
        parameters = list(model.vit.blocks[index].parameters())
        beside = is_beside(plan.adapter)
        parameters += model.adapter_parameters[index] if beside else []
        total = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        on_path = index >= model.path_start
        if maps:
            what = ["{0} x {1} x {1}".format(*maps[index])]
        else:
            n, m = tokens[index]
            m = 1 if model.contexts[index].class_token_alone else m
            what = [f"{n} -> {m}" if m < n else str(n), experts if plan.moe else "dense", str(plan.adapter or "-")]
        rows.append(
            (
                f"{index:>5}",
                "-" if not (plan.trainable and trained) else "yes" if plan.weights == "all" else plan.weights,
                "yes" if on_path else "beside" if beside else "-",
                *what,
                str(plan.storage) if on_path or beside else "-",
                f"{total:>11,} ({trained:,})",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def summary(model: MultitaskViT, config: Config) -> list[str]:
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [
        f"{config.backbone.name} ({config.backbone.weights}), {model.image_size} px, "
        f"{len(model.plan)} blocks; {total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained"
    ]
    if (blocks := config.train.alast.blocks) is not None:
        lines.append(
            f"{blocks} of {len(model.plan)} blocks train in an update, drawn by budgets, which say on how many tokens "
            "(ALaST); what is predicted is the most that an update can take"
        )
    if config.train.only is not None:
        parts = [f"{task} ({_own(model, task)})" for task in config.train.only]
        lines.append(f"all is frozen but what is their own of {', '.join(parts)}")
    if notes := getattr(model.vit, "weights_notes", []):
        lines.append(f"of the weights file, {'; '.join(notes)}")
    if any(error > 1e-4 for error in model.upcycling_errors.values()):
        errors = ", ".join(f"block {i}: {e:.3f}" for i, e in model.upcycling_errors.items())
        lines.append(f"experts start off the pretrained FFN by (relative): {errors}")
    return lines


def own_bytes(model: MultitaskViT, task: str) -> dict[str, int]:
    """Bytes that the model has for this task alone: of its head, and of its routers if each task has its own."""
    head = sum(p.nbytes for p in model.heads[task].parameters())
    return {"head": head, "routers": sum(p.nbytes for p in model.own_parameters(task)) - head}


def _own(model: MultitaskViT, task: str) -> str:
    return ", ".join(f"{part} {size / 1000:.1f} kB" for part, size in own_bytes(model, task).items() if size)
