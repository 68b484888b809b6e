"""Write a run as a plain timm model: a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

A run with dropped tokens or experts is refused, since timm has neither. A folder has one task, because timm's networks
have one head.
"""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from moe_bsr.config import Config, ConfigError
from moe_bsr.data.transforms import SMALL_IMAGE_SIDE
from moe_bsr.model.backbones import family_of
from moe_bsr.model.backbones.pretrained import in_timm
from moe_bsr.model.multitask import MultitaskViT, build
from moe_bsr.runs.checkpoint import CheckpointError
from moe_bsr.runs.finished import appearing, read_finished
from moe_bsr.runs.folder import restore_weights
from moe_bsr.runs.model_card import model_card
from moe_bsr.runs.share import public
from moe_bsr.runtime import files

TOLERANCE = 1e-4  # relative to the largest logit, at least 1. Our kernels may add in another order than timm's.

USE = """
```python
import timm

model = timm.create_model("local-dir:{name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```
"""
SMALL = (
    f"Square images of up to {SMALL_IMAGE_SIDE} px per side were resized as a whole for the accuracies here. timm's "
    "transform crops them like all others."
)


def write_timm(run: Path, out: Path, task: str | None = None, weights: str | None = None) -> dict[str, Any]:
    """Write one task of a run as a timm folder, and check that timm computes the same logits as the run.

    Args:
        task: the task, needed if the run has several.
        weights: the backbone's weights, if they have moved.
    Returns:
        task, architecture, files (size in bytes by name), and difference: the largest one between the logits of two
        random images.
    Raises:
        ConfigError: timm has no such network (with the reason), this is no run, or `out` exists already.
        CheckpointError: the weights are missing or damaged, or timm computes other logits.
    """
    finished = read_finished(run)
    config, names = finished.config, finished.config.task_names()
    if task is None and len(names) > 1:
        raise ConfigError(
            f"{run} has the tasks {', '.join(names)}, and a timm network has one head: name one task, task=NAME"
        )
    task = task or names[0]
    if task not in names:
        raise ConfigError(f"no task {task!r} in {run}: it has {', '.join(names)}")
    if (why := beyond_timm(config)) is not None:
        raise ConfigError(f"{run} cannot be a timm network: {why}; share it without timm")
    if weights is not None:
        config.backbone.weights = weights
    model = build(config, finished.classes)
    restore_weights(model, finished.weights, finished.resolved["backbone_sha256"], run)
    about, images = finished.resolved["tasks"][task], finished.resolved["images"]
    with appearing(out) as folder:
        plain = _plain(model, config, task)
        size = images["size"]
        settings = {key: images[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
        if config.data.resize == "squash":
            settings |= {"crop_pct": 1.0, "crop_mode": "squash"}
        notes = [SMALL] if settings["crop_pct"] < 1 else []
        save_for_hf(
            plain,
            str(folder),
            model_config={"label_names": about["classes"]},
            data_config=settings | {"input_size": (3, size, size)},
            safe_serialization=True,
        )
        (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode & 0o777)
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        shown, resolved = public(config, finished.resolved | {"tasks": {task: about}})
        title = f"{out.name}: {task}"
        card = model_card(title, shown, resolved, finished.report, USE.format(name=out.name), sizes, notes)
        files.write_new(folder / "README.md", card.replace("library_name: moe_bsr", "library_name: timm", 1))
        difference = _difference(model, folder, task, size)
    return {"task": task, "architecture": in_timm(config.backbone)[0], "files": sizes, "difference": difference}


def beyond_timm(config: Config) -> str | None:
    """Return what timm's networks lack to compute this run, with the key that asks for it. None if nothing."""
    plan = config.plan
    if not family_of(config.backbone).of_tokens:
        return f"{config.backbone.name} is not a Vision Transformer (backbone.name)"
    if plan.moe_blocks:
        return f"blocks {plan.moe_blocks} have experts (plan.moe_blocks)"
    if min(plan.keep_rates.values(), default=1) < 1:
        how = "merged" if config.tokens.merges else "dropped"
        return f"tokens are {how} in blocks {plan.drop_blocks} (plan.drop_blocks)"
    if config.adapter is not None:
        return "it has adapters, and merging them into the weights would round them (adapter)"
    return f"its heads read blocks {plan.head_blocks} (plan.head_blocks)" if plan.head_blocks else None


def _plain(model: MultitaskViT, config: Config, task: str) -> nn.Module:
    """Return timm's own network with the weights of the model, in evaluation mode."""
    name, arguments = in_timm(config.backbone)
    plain = timm.create_model(name, **arguments, num_classes=model.heads[task].out_features)
    head = {f"head.{name}": value for name, value in model.heads[task].state_dict().items()}
    plain.load_state_dict(model.vit.state_dict() | head)
    return plain.eval()


def _difference(model: MultitaskViT, folder: Path, task: str, size: int) -> float:
    """Load the folder with timm, and return the largest difference of the logits of two random images.

    Raises:
        CheckpointError: the difference is larger than rounding explains.
    """
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = model.eval()(images, task).logits
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
    difference = float((ours - theirs).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(ours.abs().max())):
        raise CheckpointError(f"{folder}: timm computes logits that differ by {difference:g}; nothing was written")
    return difference
