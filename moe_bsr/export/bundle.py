"""Export a trained run as a folder for a device (a bundle), and compare it with the run on validation images first.

    BUNDLE/
      <task>.onnx       images -> logits of one task, complete
      all_tasks.onnx    images -> logits of all tasks in one call; shared blocks are computed once
      weights.data      tensors that tasks share; <task>.data: tensors of one task (its router and head)
      <task>.txt        one class name per line
      config.json, preprocessor_config.json, parity.json, README.md, predict.py

In the format ExecuTorch, <task>.pte has the graph and all its weights. There is no all_tasks and no .data.

Each graph is complete, and its weights are in the .data files. A graph of the shared trunk and one graph per task after
it would save as much work. But none of these could be used alone, and with one session per graph each session would
hold the shared blocks after the trunk again. One session of all_tasks.onnx holds them once.
"""

import dataclasses
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch

from moe_bsr.config import ConfigError, require
from moe_bsr.export import card, fewer_experts, int8, on_device, parity
from moe_bsr.export.graph import SHARED_FILE, Graph, Model, Weights, data_file
from moe_bsr.export.network import Part, write
from moe_bsr.export.on_device import Bundle, sha256
from moe_bsr.model.backbones import require_tokens
from moe_bsr.runs.load import TrainedRun
from moe_bsr.runtime import files
from moe_bsr.runtime.names import printable
from moe_bsr.runtime.version import __version__

ALL_TASKS = "all_tasks.onnx"
SUFFIXES = {"onnx": ".onnx", "executorch": ".pte"}  # by format, the suffix of its graphs' files
FORMAT = 1  # version of config.json
USAGE_IMAGES = 256  # training images of a task on which the use of experts is counted


def export(
    run: TrainedRun,
    out: str | Path | None = None,
    *,
    format: str = "onnx",
    quantize: bool = False,
    experts: int | None = None,
    images: int = 512,
    on_step: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write a run's tasks as a bundle. If an error occurs, nothing is left on the disk.

        run = moe_bsr.load("runs/mine", device="cpu")
        export(run, "mine-on-device")

    Args:
        run: a run on the CPU. Its models are converted to float32.
        out: folder to write, which must not exist. By default `export` in the run's folder; a zip file has none.
        format: "onnx", or "executorch", which needs the package of that name.
        quantize: whether to round weights to int8 (ONNX only).
        experts: number of experts to keep in each layer, those that a task uses most. None keeps all.
        images: largest number of validation images per task for the comparison with the run.
        on_step: called with a description of each step.
    Returns:
        bundle, run, step, precision, bytes, whole_bytes (with all experts), files {name: bytes}, tasks {name: n, top1,
        top1_low, top1_high, parity {difference, tolerance, equal, decided_otherwise, images}; with `quantize` float32
        {top1, ...} and int8 {equal, ...}; with `experts` whole {top1, equal, ...}}.
    Raises:
        ConfigError: the run is not on the CPU, the folder exists, or the model or an option cannot be exported.
        NotEqual: a graph does not compute the same as the run.
    """
    if out is None and run.run.is_file():
        raise ConfigError(f"{run.run} is a zip file: name the folder to write, out=DIR")
    out = Path(out) if out is not None else run.run / "export"
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists; remove it, or name another folder")
    device = run.runtime.device
    require(device.type == "cpu", "device", str(device), "cpu: load the run with device='cpu' to export it")
    require_tokens(run.config.backbone, "export")
    require(format in SUFFIXES, "format", format, " or ".join(SUFFIXES))
    require(format == "onnx" or not quantize, "int8", quantize, "leave it out: only the format onnx has int8")
    _check_names(list(run.models))
    origin = card.origin(run)
    for sentence in card.deep_images(run):
        warnings.warn(sentence, stacklevel=2)
    run = dataclasses.replace(run, runtime=dataclasses.replace(run.runtime, precision="fp32"))
    for model in {id(model): model for model in run.models.values()}.values():
        model.float()  # a bf16 run has frozen matrices in bfloat16
    with run.runtime.in_effect(), torch.inference_mode():
        parts = _parts(run, experts, on_step)
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            place, result = _fill(run, origin, parts, stage, SUFFIXES[format], quantize, images, on_step)
            for file in place.iterdir():
                files.sync(file)
            place.rename(out)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    return result | {"bundle": str(out)}


def _check_names(tasks: list[str]) -> None:
    """Refuse a task that has the name of a file of every bundle."""
    taken = {Path(ALL_TASKS).stem, Path(SHARED_FILE).stem}
    for task in tasks:
        require(
            task not in taken, "tasks", task, "another name: a file of the bundle has this one; rename the task file"
        )


def _parts(run: TrainedRun, experts: int | None, on_step: Callable[[str], None]) -> dict[str, Part]:
    """Return the part of each task: its model, which of its blocks are shared, and which experts are kept."""
    models = list(run.models.values())
    shared = None
    if run.config.mode == "single_task":
        shared = models[0].path_start if len(run.grouped(run.models)) == 1 else 0
    parts = {}
    for task, model in run.models.items():
        part = Part(model, task, shared)
        if experts is not None:
            on_step(f"{task}: counting the use of experts")
            batches = (inputs for inputs, _ in parity.batches(run, task, "train", USAGE_IMAGES))
            kept = fewer_experts.most_used(model, task, batches, experts)
            part = Part(fewer_experts.reduced(model, task, kept), task, shared, kept)
        parts[task] = part
    return parts


def _fill(
    run: TrainedRun,
    origin: card.Origin,
    parts: dict[str, Part],
    stage: Path,
    suffix: str,
    quantize: bool,
    images: int,
    on_step: Callable[[str], None],
) -> tuple[Path, dict[str, Any]]:
    """Write the bundle to a folder in `stage` and compare it with the run. Return the folder and `export`'s result."""
    config, place = _config(run, parts, suffix), stage / "float32"
    if suffix == ".pte":
        from moe_bsr.export import executorch

        place.mkdir()
        executorch.write(place, parts, run.transforms.size, on_step)
        _store_words(place, config)
    else:
        models = _graphs(run, parts)
        _store(place, models, config)
    found, expected = _prove(run, parts, place, config, images, on_step)
    together = Bundle(place, threads=run.runtime.threads)
    drawn = together.normalize(on_device.check_images(run.transforms.size))
    check = {task: parity.reference(part.model, torch.from_numpy(drawn), task) for task, part in parts.items()}
    answers = together.logits(drawn)
    for task in parts:
        parity.prove(check[task], answers[task], f"{config['all_tasks'] or config['tasks'][task]['graph']}, {task}")
    if quantize:
        on_step("rounding weights to int8")
        place, config["precision"] = stage / "int8", "int8"
        _store(place, int8.quantized(models), config)
        _compare_rounded(run, place, expected, found, images)
        answers = Bundle(place, threads=run.runtime.threads).logits(drawn)
    equal = min(on_device.compare(check[task], answers[task])["equal"] for task in parts)
    record = {
        "images": "validation images of the run",
        "reference": "the run in float32",
        "tasks": found,
        "check": {
            "images": "drawn by predict.py",
            "logits": {task: logits.tolist() for task, logits in check.items()},
            "least_equal": max(equal - 1, 0),  # for int8: another processor may round differently
        },
    }
    files.write_new(place / "parity.json", json.dumps(record, indent=1, allow_nan=False))
    result = {"run": str(run.run), "step": run.step, "precision": config["precision"], "tasks": found}
    for task, numbers in found.items():
        config["tasks"][task]["val_top1"] = round(numbers["top1"], 2)
    files.write_new(place / "README.md", card.text(run, origin, config, result, place))
    _write_config(place, config)
    result["files"] = {file.name: file.stat().st_size for file in sorted(place.iterdir())}
    result["bytes"] = sum(result["files"].values())
    kept = {task: part.experts for task, part in parts.items()}
    result["whole_bytes"] = result["bytes"] + fewer_experts.left_out(run.models, kept, config["precision"])
    return place, result


def _prove(
    run: TrainedRun,
    parts: dict[str, Part],
    place: Path,
    config: dict[str, Any],
    images: int,
    on_step: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, parity.Answers]]:
    """Compare each task's graph with its model on validation images. Return the results and the model's answers."""
    found, expected = {}, {}
    together = Bundle(place, threads=run.runtime.threads) if config["all_tasks"] else None
    for task, part in parts.items():
        on_step(f"{task}: comparing with the run")
        names = run.class_names[task]
        answers = expected[task] = parity.of_model(run, part.model, task, images)
        logits = parity.of_bundle(run, Bundle(place, [task], run.runtime.threads), task, images)
        proof = parity.prove(answers.logits, logits, config["tasks"][task]["graph"])
        if together is not None:
            parity.prove(answers.logits, parity.of_bundle(run, together, task, images), f"{ALL_TASKS}, {task}")
        found[task] = parity.accuracy(logits, answers.labels, names) | {"parity": proof}
        if part.experts:
            whole = parity.of_model(run, run.models[task], task, images).logits
            equal = on_device.compare(whole, logits)["equal"]
            found[task]["whole"] = parity.accuracy(whole, answers.labels, names) | {"equal": equal}
    return found, expected


def _compare_rounded(
    run: TrainedRun, place: Path, expected: dict[str, parity.Answers], found: dict[str, Any], images: int
) -> None:
    """Replace float32's accuracy in `found` by int8's, and add float32's and the number of equal predictions."""
    for task, answers in expected.items():
        logits = parity.of_bundle(run, Bundle(place, [task], run.runtime.threads), task, images)
        before = {key: found[task][key] for key in ("n", "top1", "top1_low", "top1_high")}
        compared = on_device.compare(answers.logits, logits)
        found[task] |= parity.accuracy(logits, answers.labels, run.class_names[task])
        found[task] |= {"float32": before, "int8": {key: compared[key] for key in ("equal", "images", "difference")}}


def _graphs(run: TrainedRun, parts: dict[str, Part]) -> dict[str, Model]:
    """Return a graph per task, and if there are several tasks one graph of all."""
    weights, size = Weights(), run.transforms.size
    groups = {f"{task}.onnx": [task] for task in parts}
    if len(parts) > 1:
        groups[ALL_TASKS] = list(parts)
    models = {}
    for file, tasks in groups.items():
        graph = Graph(weights)
        images = graph.input("images", ["batch", 3, size, size])
        for task in tasks:
            graph.output(write(graph, parts[task], images), task, ["batch", len(run.class_names[task])])
        models[file] = graph.finish()
    return models


def _store(place: Path, models: dict[str, Model], config: dict[str, Any]) -> None:
    """Write graphs, weights and the files that accompany them."""
    place.mkdir()
    weights = next(iter(models.values())).weights
    places = weights.write(place)
    hashes = {data_file(owner): sha256(place / data_file(owner)) for owner in set(weights.owners.values())}
    for file, model in models.items():
        used = sorted({places[name][0] for name in model.used})
        outputs = [output.name for output in model.proto.graph.output]
        metadata = {
            "tasks": json.dumps({task: config["tasks"][task]["label_names"] for task in outputs}),
            "images": json.dumps(config["pretrained_cfg"]),
            "data_sha256": json.dumps({name: hashes[name] for name in used}),
            "run_step": str(config["run_step"]),
            "precision": config["precision"],
        }
        onnx.save(model.over(places, metadata), place / file)
        config["data_files"][file] = used
    _store_words(place, config)


def _store_words(place: Path, config: dict[str, Any]) -> None:
    """Write labels, predict.py and a first config.json."""
    for about in config["tasks"].values():
        names = "\n".join(map(printable, about["label_names"]))
        files.write_new(place / about["labels"], names + "\n")
    files.write_new(place / "preprocessor_config.json", json.dumps(_preprocessor(config["pretrained_cfg"]), indent=1))
    files.write_new(place / "predict.py", Path(on_device.__file__).read_bytes())
    _write_config(place, config)


def _write_config(place: Path, config: dict[str, Any]) -> None:
    present = sorted(file for file in place.iterdir() if file.name != "config.json")
    config["sha256"] = {file.name: sha256(file) for file in present}
    files.write_whole(place / "config.json", json.dumps(config, indent=1, allow_nan=False))


def _config(run: TrainedRun, parts: dict[str, Part], suffix: str) -> dict[str, Any]:
    """Return the content of config.json. Keys are timm's where timm has them."""
    vit, images = next(iter(parts.values())).model.vit, run.transforms
    plan, tokens, moe = (dataclasses.asdict(getattr(run.config, section)) for section in ("plan", "tokens", "moe"))
    return {
        "library_name": "moe_bsr",
        "library_version": __version__,
        "bundle_format": FORMAT,
        "precision": "float32",
        "run_step": run.step,
        "architecture": run.config.backbone.name,
        "num_features": vit.num_features,
        "global_pool": vit.global_pool,
        "pretrained_cfg": {
            "input_size": [3, images.size, images.size],
            "interpolation": images.interpolation,
            "crop_pct": images.crop_pct,
            "crop_mode": images.crop_mode,
            "resize": images.resize,
            "mean": list(images.mean),
            "std": list(images.std),
        },
        "plan": plan | {"tokens": tokens, "moe": moe},
        "tasks": {
            task: {
                "num_classes": len(run.class_names[task]),
                "label_names": run.class_names[task],
                "graph": task + suffix,
                "labels": f"{task}.txt",
                **({"experts": part.experts} if part.experts else {}),
            }
            for task, part in parts.items()
        },
        "all_tasks": ALL_TASKS if len(parts) > 1 and suffix == ".onnx" else None,
        "data_files": {},
    }


def _preprocessor(images: dict[str, Any]) -> dict[str, Any]:
    """Return the image transforms in the form of transformers, which has none for `crop_mode: border`."""
    size = images["input_size"][-1]
    side = int(size / images["crop_pct"])
    crops = images["resize"] != "squash" and images["crop_mode"] != "squash"
    straight = {"height": side, "width": side} if images["resize"] != "squash" else {"height": size, "width": size}
    return {
        "image_processor_type": "CLIPImageProcessor" if crops else "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side} if crops else straight,
        "resample": {"bilinear": 2, "bicubic": 3}[images["interpolation"]],
        "do_center_crop": images["resize"] != "squash",
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": images["mean"],
        "image_std": images["std"],
    }
