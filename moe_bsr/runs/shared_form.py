"""The shared form of a run: what somebody else needs to use it, and nothing else.

    config.json         the run's configuration and what it resolved to, the step, the sha256 of the weights
    model.safetensors   what training changed; or everything, backbone included
    report.json, report.md, README.md

`share.py` writes it. Here it is recognized and read; a folder of it can be named wherever a run can that is only read.
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
MOST_BYTES = 2**26  # of config.json


def is_shared(run: Path) -> bool:
    """Whether a folder has the shared form; one that a run is trained in has config.yaml."""
    return files.kind(run / "config.yaml") is None and files.kind(run / CONFIG) is not None


def read(run: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        ConfigError: another program's, or another version's. ValueError: damaged. OSError: not to be read.
    """
    file = run / CONFIG
    files.require(file, "a file")
    if file.stat().st_size > MOST_BYTES:
        raise ConfigError(f"{file.stat().st_size} bytes, and {MOST_BYTES} at most are read")
    try:
        tree = json.loads(files.read_text(file))
    except RecursionError:
        raise ConfigError("nested too deeply") from None
    if not isinstance(tree, dict) or tree.get("library_name") != "moe_bsr":
        raise ConfigError("it is of no run of moe_bsr (library_name)")
    if tree.get("format") != FORMAT:
        raise ConfigError(f"format {tree.get('format')!r:.20}, and this version reads {FORMAT}: use a newer moe_bsr")
    if not isinstance(tree.get("run"), dict) or type(tree.get("step")) is not int or tree["step"] < 0:
        raise ConfigError("no keys run and step")
    return tree


def read_weights(run: Path) -> tuple[Path, dict[str, Tensor], int]:
    """The file of the weights, the weights and their step.

    Raises:
        CheckpointError: missing, damaged, or not those of config.json.
    """
    file, tree = run / WEIGHTS, read(run)
    try:
        if sha256_of(file) != tree.get("sha256"):
            raise CheckpointError(f"{file} does not match its hash in {CONFIG}: fetch both again")
        return file, load_file(file), tree["step"]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or unreadable ({error})") from error
