"""Describe a model before training, block by block. Memory and FLOPs are computed in `cost/`."""

from moe_bsr.config import Config
from moe_bsr.model.adapters import is_beside
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.plan import token_counts
from moe_bsr.runtime.text_tables import as_text


def counts(model: MultitaskViT) -> list[tuple[int, int]]:
    """Return (tokens in attention, tokens in FFN) of each block of a Vision Transformer."""
    vit, tokens = model.vit, model.tokens_config
    entering = vit.patch_embed.num_patches + vit.num_prefix_tokens
    return token_counts(model.plan, entering, vit.num_prefix_tokens, tokens.fuses, tokens.protect_fused)


def table(model: MultitaskViT, config: Config) -> list[str]:
    """Return the plan as a table, one line per block: settings, whether its backward pass runs, and parameters."""
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
    return as_text(rows, right=False).split("\n")


def summary(model: MultitaskViT, config: Config) -> list[str]:
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [
        f"{config.backbone.name} ({config.backbone.weights}), {model.image_size} px, "
        f"{len(model.plan)} blocks; {total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained"
    ]
    if (blocks := config.train.alast.blocks) is not None:
        lines.append(
            f"ALaST: each update trains {blocks} of {len(model.plan)} blocks and some of their tokens, drawn by "
            "budgets; the predicted cost is the highest that an update can have"
        )
    if model.head_blocks:
        lines.append(f"heads also read the class tokens of blocks {', '.join(map(str, model.head_blocks))}")
    if config.train.only is not None:
        parts = [f"{task} ({_own(model, task)})" for task in config.train.only]
        lines.append(f"only these tasks' own parameters train: {', '.join(parts)}")
    if notes := getattr(model.vit, "weights_notes", []):
        lines.append(f"weights file: {'; '.join(notes)}")
    if any(error > 1e-4 for error in model.upcycling_errors.values()):
        errors = ", ".join(f"block {i}: {e:.3f}" for i, e in model.upcycling_errors.items())
        lines.append(f"relative error of the initial experts against the pretrained FFN: {errors}")
    return lines


def own_bytes(model: MultitaskViT, task: str) -> dict[str, int]:
    """Return the bytes of parameters that only this task uses: its head, and its routers if each task has its own."""
    head = sum(p.nbytes for p in model.heads[task].parameters())
    return {"head": head, "routers": sum(p.nbytes for p in model.own_parameters(task)) - head}


def _own(model: MultitaskViT, task: str) -> str:
    return ", ".join(f"{part} {size / 1000:.1f} kB" for part, size in own_bytes(model, task).items() if size)
