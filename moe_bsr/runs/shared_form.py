"""Recognize and read the shared form of a run, which has only what others need to use it.

    config.json         the run's configuration and what it resolved to, the step, the sha256 of the weights
    model.safetensors   the weights that training changed, or all weights including the backbone's
    report.json, report.md, README.md

`share.py` writes it. Commands that only read a run accept such a folder too.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moe_bsr.config import ConfigError
from moe_bsr.runs.checkpoint import CheckpointError, sha256_of
from moe_bsr.runtime import files

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FILES = (CONFIG, WEIGHTS, "report.json", "report.md", "README.md")
FORMAT = 1
MOST_BYTES = 2**26  # largest config.json that is read


def is_shared(run: Path) -> bool:
    """Return whether a folder has the shared form. The folder of a training run has config.yaml."""
    return files.kind(run / "config.yaml") is None and files.kind(run / CONFIG) is not None


def read(run: Path) -> dict[str, Any]:
    """Return the content of config.json.

    Raises:
        ConfigError: it is of another program or version. ValueError: it is damaged. OSError: it cannot be read.
    """
    file = run / CONFIG
    files.require(file, "a file")
    if file.stat().st_size > MOST_BYTES:
        raise ConfigError(f"it has {file.stat().st_size} bytes, and at most {MOST_BYTES} are read")
    try:
        tree = json.loads(files.read_text(file))
    except RecursionError:
        raise ConfigError("it is nested too deeply") from None
    if not isinstance(tree, dict) or tree.get("library_name") != "moe_bsr":
        raise ConfigError("it does not belong to a run of moe_bsr (library_name)")
    if tree.get("format") != FORMAT:
        raise ConfigError(
            f"it has format {tree.get('format')!r:.20}, and this version reads {FORMAT}: use a newer moe_bsr"
        )
    if not isinstance(tree.get("run"), dict) or type(tree.get("step")) is not int or tree["step"] < 0:
        raise ConfigError("it lacks valid keys run and step")
    return tree


def read_weights(run: Path) -> tuple[Path, dict[str, Tensor], int]:
    """Return the file of the weights, the weights by name, and their step.

    Raises:
        CheckpointError: the file is missing, damaged, or does not match its hash in config.json.
    """
    file, tree = run / WEIGHTS, read(run)
    try:
        if sha256_of(file) != tree.get("sha256"):
            raise CheckpointError(f"{file} does not match its hash in {CONFIG}: fetch both again")
        return file, load_file(file), tree["step"]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or unreadable ({error})") from error
