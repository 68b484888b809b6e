"""Write the model card of a bundle: what it is, its accuracy and cost, where it comes from, how to run it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_bsr.export.on_device import Bundle, measure
from moe_bsr.runs import archive
from moe_bsr.runs import report as reports
from moe_bsr.runs.config_file import read_config
from moe_bsr.runs.load import TrainedRun
from moe_bsr.runtime import cpu_features
from moe_bsr.runtime.names import printable
from moe_bsr.runtime.text_tables import as_markdown

RUNTIMES = {  # by suffix of a graph's file: its tag, the packages that run it, and how to use it
    ".onnx": (
        "onnx",
        "onnxruntime",
        "Every graph takes `images`, normalized float32 (B, 3, S, S) for any B, and returns logits (B, classes) under "
        "the task's name. Keep the `.data` files beside the graphs: `weights.data` is shared, `<task>.data` belongs to "
        "a task. To use one task on a device, copy that task's files and `weights.data`. OpenVINO reads the graphs "
        "without conversion.",
    ),
    ".pte": (
        "executorch",
        "executorch torch",
        "Every program has one method, `forward`: normalized float32 (1, 3, S, S) -> logits (1, classes). It contains "
        "all its weights and needs ExecuTorch's XNNPACK backend and portable kernels. `predict.py` uses ExecuTorch's "
        "Python package, which needs torch. Apps load the program with ExecuTorch's own libraries.",
    ),
}


@dataclass(slots=True)
class Origin:
    """What a card says that is not in a loaded run: `backbone.weights`, which loading may change, and the report."""

    weights: str
    report: dict[str, Any] | None


def origin(run: TrainedRun) -> Origin:
    """Read the origin of a run from its folder or zip file.

    Raises:
        ConfigError: the report is damaged.
    """
    with archive.opened(run.run) as folder:
        return Origin(read_config(folder)[0].backbone.weights, reports.read(folder))


def deep_images(run: TrainedRun) -> list[str]:
    """Return a sentence for each task with 16-bit images (`bits` in its file), which a bundle does not read."""
    said = {task: run.recorded.get(task, {}).get("spec", {}).get("bits") for task in run.models}
    return [
        f"{task}: its images may have 16 bits (bits: {bits} in its task file), and predict.py reads images of 8 bits "
        f"only: convert each gray value as the run does, to value * 255 // {2**bits - 1}."
        for task, bits in said.items()
        if bits is not None
    ]


def text(run: TrainedRun, origin: Origin, config: dict[str, Any], result: dict[str, Any], place: Path) -> str:
    """Return README.md of the bundle at `place`. All other files must have been written."""
    license, weights = _backbone(run, origin.weights)
    runtime, package, how = RUNTIMES[Path(next(iter(config["tasks"].values()))["graph"]).suffix]
    name = printable(run.run.resolve().name)
    return "\n".join(
        [
            "---",
            "library_name: moe_bsr",
            f"license: {license}",
            "pipeline_tag: image-classification",
            f"tags: [image-classification, {runtime}, vision-transformer, multitask]",
            "---",
            "",
            f"# {name}",
            "",
            f"A Vision Transformer ({config['architecture']}) for {len(config['tasks'])} image-classification task(s), "
            f"trained and exported by moe_bsr {config['library_version']}: step {config['run_step']}, "
            f"weights in {config['precision']}.",
            "",
            "## Run it",
            "",
            "```",
            f"pip install {package} numpy pillow",
            "python predict.py photo.jpg      # all tasks",
            "python predict.py --check        # compare this machine's answers with the exported run's",
            "python predict.py --time         # milliseconds and memory on this machine",
            "```",
            "",
            how + " `config.json` has size, mean and std, `<task>.txt` the class names.",
            "",
            *(line for sentence in deep_images(run) for line in (sentence, "")),
            "## Accuracy",
            "",
            *_accuracy(run, result, origin.report),
            "",
            "## Comparison with the run",
            "",
            *_parity(result),
            "",
            "## Cost",
            "",
            *_cost(place, origin.report),
            "",
            "## Where it comes from",
            "",
            f"* Backbone: {config['architecture']}, {weights}",
            *(f"* {task}: {_data(run, task)}" for task in config["tasks"]),
            "",
            "Check yourself whether the licenses of images and weights allow your use.",
            "",
        ]
    )


def _backbone(run: TrainedRun, weights: str) -> tuple[str, str]:
    """Return a license identifier, and the origin of the pretrained weights in words."""
    if weights == "bundled":
        return "mit", "the weights that come with moe_bsr (trained on drawn images; MIT)"
    if weights == "random":
        return "unknown", "random weights"
    known = getattr(next(iter(run.models.values())).vit, "pretrained_cfg", None) or {}
    if weights == "hub":
        license = known.get("license") or "unknown"
        return license, f"timm's pretrained weights ({known.get('hf_hub_id') or 'hub'}; license: {license})"
    return "unknown", f"weights of the file {printable(Path(weights).name)}; their license is not known"


def _data(run: TrainedRun, task: str) -> str:
    spec = run.recorded[task].get("spec", {})
    home = f", {spec['homepage']}" if spec.get("homepage") else ""
    return printable(f"{spec.get('title', task)}{home}; license of the images: {spec.get('license') or 'not stated'}")


def _accuracy(run: TrainedRun, result: dict[str, Any], report: dict[str, Any] | None) -> list[str]:
    rows = [["task", "classes", "top-1 %, validation", "95 % interval", "images"]]
    for task, scores in result["tasks"].items():
        interval = f"{scores['top1_low']:.1f} - {scores['top1_high']:.1f}"
        rows.append([task, str(len(run.class_names[task])), f"{scores['top1']:.1f}", interval, str(scores["n"])])
    lines = [
        "Accuracy of these graphs on validation images of the run. The run's checkpoint was chosen by validation "
        "accuracy, so expect a little less on new images.",
        "",
        as_markdown(rows),
    ]
    scored = {} if report is None or report["split"] != "test" else report["tasks"]
    of_this = {t: s for t, s in scored.items() if t in result["tasks"] and _is_of_loaded(run, s)}
    if of_this:
        tests = [f"{t} {s['top1']:.1f} ({s['top1_low']:.1f} - {s['top1_high']:.1f})" for t, s in of_this.items()]
        lines += ["", f"Test accuracy of the run before the export: {', '.join(tests)}."]
    return lines


def _is_of_loaded(run: TrainedRun, scores: dict[str, Any]) -> bool:
    """Return whether a report's scores are those of the loaded weights. Not checked for one model per task."""
    return "top1" in scores and (run.config.mode == "single_task" or scores.get("scored_step") == run.step)


def _parity(result: dict[str, Any]) -> list[str]:
    worst = max(scores["parity"]["difference"] / scores["parity"]["tolerance"] for scores in result["tasks"].values())
    images = sum(scores["parity"]["images"] for scores in result["tasks"].values())
    lines = [
        f"On {images} validation images the logits of the float32 graphs differ from the run's by at most {worst:.2f} "
        "of the tolerance, 1e-4 times the largest logit. `parity.json` has the numbers."
    ]
    for task, scores in result["tasks"].items():
        if "whole" in scores:
            whole, n = scores["whole"], scores["n"]
            lines.append(
                f"* {task}: experts were left out. With all of them top-1 is {whole['top1']:.1f} %, and "
                f"{whole['equal']} of {n} predictions are equal."
            )
        if "int8" in scores:
            lines.append(
                f"* {task}: {scores['int8']['equal']} of {scores['int8']['images']} predictions in int8 equal those in "
                f"float32, whose top-1 is {scores['float32']['top1']:.1f} %."
            )
    return lines


def _cost(place: Path, report: dict[str, Any] | None) -> list[str]:
    size = sum(file.stat().st_size for file in place.iterdir()) / 2**20
    bundle = Bundle(place, threads=1)
    measured = measure(bundle, repeats=10)
    each = [f"* {size:.1f} MB on disk."]
    each.append(
        f"* {measured['cpu_ms']:.1f} ms of CPU per image for {len(bundle.tasks)} task(s), batch 1, on "
        f"{cpu_features.name()}, measured at export. Other programs may have run at the same time."
    )
    if report is not None and report.get("gflops_per_image"):
        each.append(f"* {report['gflops_per_image']:.2f} GFLOPs per image for one task.")
    return each
