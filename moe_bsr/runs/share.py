"""Share a run: write what others need to use it as a folder or zip file, or upload it to a model hub.

Left out are the optimizer's state, the metrics, the images' names, and all paths and commands of this machine.
"""

import contextlib
import functools
import itertools
import json
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from moe_bsr import config as configuration
from moe_bsr.config import Config, ConfigError
from moe_bsr.model.multitask import build
from moe_bsr.runs import archive, report, shared_form
from moe_bsr.runs.checkpoint import sha256_of
from moe_bsr.runs.finished import Finished, appearing, read_finished
from moe_bsr.runs.folder import restore_weights
from moe_bsr.runs.model_card import OWN, model_card
from moe_bsr.runtime import files

# Keys of the report that are shared: numbers about the model, and what may change them.
REPORTED = (
    *("status", "signal", "split", "mean_top1", "selected_step", "selected_mean_val_top1", "step", "planned_steps"),
    *("weights", "train_seconds", "measured_peak_mb", "predicted_peak_mb", "gflops_per_image", "test_evaluations"),
    *("environment", "commit", "expert_use"),
)
RESOLVED = (
    *("backbone_sha256", "images", "version", "commit", "precision", "threads", "device", "torch", "timm", "python"),
)

USE = """
Install moe_bsr from a clone of its repository: `pip install .` there. Then:

```
moe-bsr predict {name} photo.jpg
```

```python
import moe_bsr

run = moe_bsr.load("{name}")
run.predict("photo.jpg")
{test}```

`moe-bsr add-task {name} TASK` adds a task to it.
"""
# Not for a zip file, in which test evaluations cannot be counted.
TEST = 'moe_bsr.evaluate("{name}", "test", data_root="DATA")  # DATA has the images in the same subfolders\n'


def share(run: Path, out: Path, with_backbone: bool = False, weights: str | None = None) -> dict[str, int]:
    """Write the shared form of a run.

    Args:
        out: a folder, or a zip file if its name ends in .zip.
        with_backbone: whether to include the backbone's frozen weights. If not, the user needs them from elsewhere.
        weights: the backbone's weights, if they have moved.
    Returns:
        Size in bytes of each file, by name.
    Raises:
        ConfigError: this is no run, it has one model per task, or `out` exists already.
        CheckpointError: the weights are missing or damaged. OSError: it could not be written.
    """
    finished = read_finished(run)
    with contextlib.ExitStack() as places:
        if out.suffix == ".zip":
            if files.kind(out) is not None:
                raise ConfigError(f"{out} exists already; remove it, or name another place")
            out.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(places.enter_context(tempfile.TemporaryDirectory(prefix="moe_bsr_")))
        else:
            folder = places.enter_context(appearing(out))
        _fill(finished, folder, out.name, with_backbone, weights)
        if out.suffix == ".zip":
            archive.write(folder, out)
        return {name: (folder / name).stat().st_size for name in shared_form.FILES if (folder / name).is_file()}


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Upload a shared folder to the Hugging Face hub, and return its address there.

    HF_ENDPOINT names another hub. The user is the one logged in (`hf auth login`), or that of HF_TOKEN.

    Raises:
        ConfigError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        hub.create_repo(repository, private=private, exist_ok=True)
        done = hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="moe-bsr share")
    except Exception as error:  # hub clients raise many kinds; all mean the same to the user
        raise ConfigError(f"{repository}: could not be pushed: {error}") from error
    return str(done.repo_url)


def _fill(finished: Finished, folder: Path, name: str, with_backbone: bool, weights: str | None) -> None:
    tensors = finished.weights
    if with_backbone:
        config = finished.config
        if weights is not None:
            config = replace(config, backbone=replace(config.backbone, weights=weights))
        model = build(config, finished.classes)
        restore_weights(model, tensors, finished.resolved["backbone_sha256"], folder)
        tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    config, resolved = public(finished.config, finished.resolved)
    card = functools.partial(model_card, config=config, notes=[_backbone_note(config, with_backbone)])
    if with_backbone and config.backbone.weights not in (*OWN, "hub"):  # the backbone's file is no longer needed
        config = replace(config, backbone=replace(config.backbone, weights="random"))
    if with_backbone:
        config = replace(config, train=replace(config.train, save="all"))
    save_file(tensors, folder / shared_form.WEIGHTS, metadata={"format": "pt"})
    tree = {
        "library_name": "moe_bsr",
        "format": shared_form.FORMAT,
        "architecture": config.backbone.name,
        "step": finished.step,
        "sha256": sha256_of(folder / shared_form.WEIGHTS),
        "run": configuration.to_dict(config) | {"resolved": resolved},
    }
    files.write_new(folder / shared_form.CONFIG, json.dumps(tree, indent=1))
    # safetensors makes its files readable by their owner only
    (folder / shared_form.WEIGHTS).chmod((folder / shared_form.CONFIG).stat().st_mode & 0o777)
    shared_report = None if finished.report is None else _public_report(finished.report, config)
    if shared_report is not None:
        report.write(folder, shared_report)
    sizes = {each: (folder / each).stat().st_size for each in shared_form.FILES if (folder / each).is_file()}
    title = f"{Path(name).stem}: {', '.join(config.tasks)}"
    use = USE.format(name=name, test="" if name.endswith(".zip") else TEST.format(name=name))
    text = card(title=title, resolved=resolved, report=shared_report, use=use, files=sizes)
    files.write_new(folder / "README.md", text)


def _backbone_note(config: Config, included: bool) -> str:
    """Return a sentence that says where a user gets the backbone's weights."""
    if included:
        return "All weights are included, those of the backbone too."
    here, weights = "Only the weights that training changed are included.", config.backbone.weights
    if weights == "hub":
        return f"{here} timm downloads those of the backbone when the model is loaded."
    if weights in OWN:
        return f"{here} Those of the backbone come with moe_bsr."
    return f'{here} Those of the backbone are needed too, the file {weights}: `moe_bsr.load(..., weights="FILE")`.'


def public(config: Config, resolved: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """Return a configuration and what it resolved to, without paths of this machine and names of images."""
    public_config = replace(
        config,
        tasks=config.task_names(),
        storage=without_folder(config.storage),
        backbone=replace(config.backbone, weights=Path(config.backbone.weights).name),
        data=replace(config.data, root="data", feature_cache_dir=None),
    )
    specs = _public_specs({task: about["spec"] for task, about in resolved["tasks"].items()})
    tasks = {
        task: {key: value for key, value in about.items() if key in ("classes", "splits", "added")}
        | {"origin": specs[task]["source"], "spec": specs[task]}
        for task, about in resolved["tasks"].items()
    }
    return public_config, {key: resolved[key] for key in RESOLVED if key in resolved} | {"tasks": tasks}


def without_folder(storage: Any) -> Any:
    """Return a value of the key `storage`, in any of its forms, without the folder of `offload`."""
    if isinstance(storage, list):
        return [without_folder(each) for each in storage]
    return {k: v for k, v in storage.items() if k != "folder"} if isinstance(storage, dict) else storage


def _public_specs(specs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return task specifications in which each path that leads outside the data root is its last part.

    If another path has that name already, the name of the task comes before it, and a number if that is taken too.
    """
    inside = {
        text for spec in specs.values() for value in spec.values() for text in _texts(value) if not _is_place(text)
    }
    taken = {text: text for text in inside}

    def named(task: str, key: str, value: Any) -> Any:
        if isinstance(value, list) and key != "class_names":
            return [named(task, key, each) for each in value]
        if not _is_place(value):
            return value
        parts = [part for part in Path(value).parts if part not in ("/", "..") and part[0] != "~"]
        name = parts[-1] if parts else task
        folders = itertools.chain([""], [f"{task}/"], (f"{task}_{number}/" for number in itertools.count(2)))
        return next(folder + name for folder in folders if taken.setdefault(folder + name, value) == value)

    return {task: {key: named(task, key, value) for key, value in spec.items()} for task, spec in specs.items()}


def _texts(value: Any) -> list[str]:
    """Return a value of a task file that is a text, or the texts of a list."""
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]


def _is_place(value: Any) -> bool:
    """Return whether a value is a path that leads outside the data root, or a pattern of such paths ({/a,/b}.tar)."""
    if not isinstance(value, str):
        return False
    return re.search(r"(^|[{,])[/~]|file://", value) is not None or ".." in Path(value).parts


def _public_report(full_report: dict[str, Any], config: Config) -> dict[str, Any]:
    """Return a report without the command and without names of images."""
    tasks = {
        task: {key: value for key, value in about.items() if key != "skipped"}
        for task, about in full_report["tasks"].items()
    }
    kept = {key: full_report[key] for key in REPORTED if key in full_report}
    return kept | {"tasks": tasks, "config": configuration.to_dict(config), "lost_best": None, "command": None}
