"""Write the model card: README.md of a shared run or a bundle, in the form that model hubs read.

It says what the model is for, its accuracy and on which images, what it consists of, and how to use it.
"""

from pathlib import Path
from typing import Any

import timm
import yaml

from moe_bsr.config import Config
from moe_bsr.model.backbones import family_of
from moe_bsr.runtime.names import printable
from moe_bsr.runtime.version import __version__

OWN = ("bundled", "random")  # values of backbone.weights that need no weights of somebody else


def model_card(
    title: str,
    config: Config,
    resolved: dict[str, Any],
    report: dict[str, Any] | None,
    use: str,
    files: dict[str, int],
    notes: list[str] | None = None,
) -> str:
    """Return the card in Markdown, with the YAML header that the Hugging Face hub reads.

    Args:
        resolved: `resolved` of the run's config.yaml. The card shows each task's classes and license.
        report: the run's report. Without one the card has no accuracies.
        use: Markdown that shows how to use the model.
        files: size in bytes of each file, by name.
        notes: more paragraphs.
    """
    tasks, kind = resolved["tasks"], "Vision Transformer" if family_of(config.backbone).of_tokens else "ResNet"
    split = (report or {}).get("split", "test")
    lines = [
        "---",
        yaml.safe_dump(_head(config), sort_keys=False).rstrip(),
        "---",
        "",
        f"# {printable(title)}",
        "",
        f"Image classification of {len(tasks)} task{'s' * (len(tasks) > 1)} by one {kind}, trained with "
        f"moe_bsr {resolved.get('version', __version__)}.",
        "",
        f"| task | classes | top-1 % ({split}) | 95 % interval | images | validation top-1 % | chance % | license of "
        "the images |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, about in tasks.items():
        lines.append(f"| {name} | {' | '.join(_row(about, (report or {}).get('tasks', {}).get(name, {})))} |")
    lines += [
        "",
        *(line for note in notes or [] for line in (note, "")),
        "## Use",
        "",
        use.strip(),
        "",
        "## Classes",
        "",
    ]
    lines += [f"* {name}: {', '.join(map(_plain, about['classes']))}" for name, about in tasks.items()]
    lines += ["", "## Model", "", *_model_facts(config, resolved, report), "", "## Files", ""]
    lines += [f"* `{name}`: {size / 1000:,.1f} kB" for name, size in files.items()]
    return "\n".join(lines) + "\n"


def backbone_license(config: Config) -> str | None:
    """Return the license of a backbone's weights as the hub names it, according to timm. None if unknown."""
    if config.backbone.weights in OWN:
        return "mit"
    cfg = timm.get_pretrained_cfg(config.backbone.name) if config.backbone.weights == "hub" else None
    return getattr(cfg, "license", None)


def _head(config: Config) -> dict[str, Any]:
    license = backbone_license(config)
    return {
        "library_name": "moe_bsr",
        "pipeline_tag": "image-classification",
        **({"license": license} if license else {}),
        **({"base_model": f"timm/{config.backbone.name}"} if config.backbone.weights == "hub" else {}),
        "tags": ["image-classification", "multi-task", "vision-transformer", "moe_bsr"],
    }


def _row(about: dict[str, Any], scores: dict[str, Any]) -> list[str]:
    known = "top1" in scores
    return [
        str(len(about["classes"])),
        f"{scores['top1']:.1f}" if known else "-",
        f"{scores['top1_low']:.1f} - {scores['top1_high']:.1f}" if known else "-",
        str(scores["n"]) if known else "-",
        f"{scores['val_top1']:.1f}" if "val_top1" in scores else "-",
        f"{scores['chance']:.1f}" if known else "-",
        _plain(str(about["spec"].get("license") or "not stated")),
    ]


def _model_facts(config: Config, resolved: dict[str, Any], report: dict[str, Any] | None) -> list[str]:
    plan, moe, weights = config.plan, config.moe, config.backbone.weights
    place = weights if weights in ("bundled", "hub", "random") else f"the file {Path(weights).name}"
    said = backbone_license(config) or "not known, ask the source of the weights"
    trained = "all blocks" if plan.train_blocks == "all" else f"blocks {_listed(plan.train_blocks)}"
    if plan.train_weights != "all":
        trained = f"{trained}, but only {plan.train_weights} in them (plan.train_weights)"
    lines = [
        f"* Backbone: {config.backbone.name}, weights {place}, sha256 `{resolved['backbone_sha256']}`. "
        f"License of its weights: {said}.",
        f"* Trained: {trained if plan.train_blocks else 'only the heads'}.",
    ]
    if plan.moe_blocks:
        lines.append(f"* Experts: {moe.words} in blocks {_listed(plan.moe_blocks)}.")
    if plan.drop_blocks:
        how = "merged" if config.tokens.merges else "dropped"
        lines.append(f"* Tokens {how} after the attention of blocks {_listed(plan.drop_blocks)}.")
    if report is not None and report.get("gflops_per_image"):
        lines.append(f"* {report['gflops_per_image']:.2f} GFLOPs per image.")
    images = resolved["images"]
    crop = f"crop {images['crop_pct']:g} ({images['crop_mode']})"
    crop = "squashed to the square, without a crop" if config.data.resize == "squash" else crop
    lines.append(
        f"* Images: {images['size']} px, mean {_listed(images['mean'])}, std {_listed(images['std'])}, "
        f"{images['interpolation']}, {crop}."
    )
    return lines


def _plain(name: str) -> str:
    """Escape a name so that Markdown shows it as it is, also in a table cell."""
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>()#+!|$" else letter for letter in printable(name))


def _listed(values: list) -> str:
    return ", ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)
