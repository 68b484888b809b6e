"""Read weights files: recognize the format, and find the backbone's tensors in it.

If a checkpoint holds several parts, one of them is used. A prefix that a wrapper put before all names is removed. Notes
for the user say so. No code in a file is ever executed.
"""

import re
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

# Keys of a checkpoint under which a backbone may be, the best first: averaged weights before the weights themselves.
PARTS = (
    "state_dict_ema", "model_ema", "ema", "teacher", "target_encoder", "state_dict", "model", "student", "encoder",
    "backbone", "module", "net", "network", "weights", "params",
)  # fmt: skip
ANCHOR = "patch_embed.proj.weight"  # a tensor that every ViT has, by timm's names
MAGIC = {
    b"\x1f\x8b": "packed with gzip: unpack it",
    b"BZh": "packed with bzip2: unpack it",
    b"\xfd7zXZ": "packed with xz: unpack it",
    b"\x28\xb5\x2f\xfd": "packed with zstd: unpack it",
    b"\x89HDF": "an HDF5 file (Keras)",
    b"GGUF": "a GGUF file (quantized, for llama.cpp)",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"%PDF": "a PDF",
}


# timm's checkpoints contain an argparse.Namespace. It is unpickled as a SimpleNamespace, which is harmless.
ARGUMENTS = SimpleNamespace, "argparse.Namespace"


class NotWeights(ValueError):
    """The file is no weights file or holds no usable weights. The message says what it is instead."""


def read(file: Path, anchor: str = ANCHOR) -> tuple[dict[str, Tensor], list[str]]:
    """Return the backbone's tensors by name, and notes for the user on which part of the file was used.

    Args:
        anchor: name of a tensor that every network of the family has. Anything before it in the file is a prefix.
    Raises:
        NotWeights: says what the file is instead, and what to do.
    """
    with file.open("rb") as stream:
        head = stream.read(4096)
    if (other := foreign(head)) is not None:
        raise NotWeights(other)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        if any(Path(name).name == "constants.pkl" for name in names):
            raise NotWeights("a TorchScript program: save its state_dict() with torch.save")
        if names and all(name.endswith(".npy") for name in names):
            raise NotWeights("NumPy arrays: a file of Google's original release has to end in .npz")
    elif head[:2] == b"PK":
        raise NotWeights("cut off or damaged (a zip archive without its end): fetch it again")
    content = _safetensors(file) if head[8:9] == b"{" else _torch_file(file)
    state, notes = _part(content, anchor)
    return _without_prefix(state, notes, anchor)


def foreign(head: bytes) -> str | None:
    """Name what a file is, judging by its first bytes; None if it may be a weights file."""
    if not head:
        return "empty: fetch the file again"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer in place of the file: fetch the file itself (git lfs pull)"
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            return what
    if not head.strip(b"\0"):
        return "nothing but zeros: fetch the file again"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start[:1] == b"<":
        return "a web page in place of the file: open its address in a browser to see why, and download the file itself"
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**40:
        return None  # safetensors
    try:
        text = head.decode("ascii").split("\n")[0]
    except UnicodeDecodeError:
        return None
    printable = all(c.isprintable() or c in "\t\r" for c in text)
    return f"a text file, which begins with {text[:60]!r}" if printable else None


def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except Exception as error:  # SafetensorError has no public base class
        raise NotWeights(f"cut off or damaged ({_first_line(error)}): fetch it again") from None


def _torch_file(file: Path) -> Any:
    try:
        # Pass a stream, because torch.load interprets the ending of a path.
        with torch.serialization.safe_globals([ARGUMENTS]), file.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # files of other formats are reported below
            return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for damaged or foreign files
        types = _types_refused(file, str(error))
        if not types:
            raise NotWeights("no weights file, cut off or damaged: fetch it again") from None
    raise NotWeights(
        f"holds {', '.join(types)} beside tensors, and unpickling these can run arbitrary code. If you trust the file, "
        f"save only the tensors: import pickle, torch; s = torch.load({file.name!r}, 'cpu', pickle); "
        "torch.save({k: v for k, v in s.items() if torch.is_tensor(v)}, 'tensors.pth') "
        "(use s['model'] or s.state_dict() if the tensors are there)"
    )


def _types_refused(file: Path, message: str) -> list[str]:
    """List the types in a pickle that are not plain tensors and containers. Empty if these are not the problem."""
    try:
        with file.open("rb") as stream:
            types = torch.serialization.get_unsafe_globals_in_checkpoint(stream)
    except Exception:  # the function works only for zip archives, and not for every content
        types = re.findall(r"GLOBAL ([\w.]+)", message)
    types = [name for name in sorted(types) if name != ARGUMENTS[1]]
    return types[:4] + ([f"{len(types) - 4} more types"] if len(types) > 4 else [])


def _part(content: Any, anchor: str, path: str = "", depth: int = 3) -> tuple[dict[str, Tensor], list[str]]:
    """Return the dictionary of tensors within a checkpoint's content, and a note if it was not at the top."""
    if not isinstance(content, dict):
        raise NotWeights(f"{path or 'it'} holds no tensors by name, but {type(content).__name__}")
    state = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    inner = {key: value for key, value in content.items() if isinstance(value, dict) and _has_tensors(value, depth)}
    if (state and not inner) or (state and any(name.endswith(anchor) for name in state)):
        return state, []
    chosen = next((name for name in PARTS if name in inner), next(iter(inner)) if len(inner) == 1 else None)
    if chosen is None:
        keys = ", ".join(str(key) for key in content) or "nothing at all"
        raise NotWeights(f"no tensors by name, but {keys[:200]}; save the part that is the backbone on its own")
    state, notes = _part(inner[chosen], anchor, f"{path}{chosen}.", depth - 1)
    others = [name for name in inner if name != chosen]
    return state, [f"{path}{chosen} was used" + (f", not {', '.join(others)}" if others else ""), *notes]


def _has_tensors(content: dict, depth: int) -> bool:
    values = content.values()
    return any(isinstance(v, Tensor) for v in values) or (
        depth > 0 and any(isinstance(v, dict) and _has_tensors(v, depth - 1) for v in values)
    )


def _without_prefix(state: dict[str, Tensor], notes: list[str], anchor: str) -> tuple[dict[str, Tensor], list[str]]:
    """Remove the prefix that a wrapper put before the backbone's names, if there is one."""
    found = [name.removesuffix(anchor) for name in state if name == anchor or name.endswith("." + anchor)]
    if not found or "" in found:
        return state, notes

    def rank(prefix: str) -> int:
        return min((PARTS.index(word) for word in prefix.split(".") if word in PARTS), default=len(PARTS))

    best = min(found, key=rank)
    others = [prefix for prefix in found if prefix != best]
    if others and rank(best) == rank(min(others, key=rank)):
        raise NotWeights(f"several networks, under {', '.join(found)}: save the one that is the backbone on its own")
    kept = {name.removeprefix(best): value for name, value in state.items() if name.startswith(best)}
    ignored = f", and {len(state) - len(kept)} tensors without it were ignored" if len(kept) < len(state) else ""
    return kept, [*notes, f"the prefix {best!r} was removed{ignored}"]


def check_usable(state: dict[str, Tensor]) -> None:
    """Refuse tensors that cannot be a network's weights: sparse, without data, quantized, or not finite.

    Raises:
        NotWeights: names the first such tensors.
    """
    hollow = [name for name, tensor in state.items() if tensor.is_meta or tensor.layout is not torch.strided]
    if hollow:
        raise NotWeights(f"sparse, or shapes without data: {_some(hollow)}; export dense weights")
    rounded = [f"{name} is {_dtype(t)}" for name, t in state.items() if not t.is_floating_point() or t.itemsize == 1]
    if rounded:
        raise NotWeights(f"{_some(rounded)}: quantized; export the float weights")
    endless = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if endless:
        raise NotWeights(f"not finite: {_some(endless)}; the file is damaged, or its training diverged")


def npz_misfit(file: Path, depth: int) -> str | None:
    """Describe a wrong number of blocks in one of Google's .npz files, which timm's reader would not notice.

    Raises:
        NotWeights: no zip archive, or integer arrays, which timm's reader would accept as weights.
    """
    if not zipfile.is_zipfile(file):
        raise NotWeights("cut off or damaged (no zip archive): fetch it again")
    with np.load(file, allow_pickle=False) as arrays:
        blocks = {int(n) + 1 for name in arrays.files for n in re.findall(r"encoderblock_(\d+)/", name)}
        stacked = [name for name in arrays.files if "/encoderblock/" in name]
        blocks |= {len(arrays[stacked[0]])} if stacked else set()
        if blocks and max(blocks) != depth:
            return f"it has {max(blocks)} blocks, the model {depth}"
        kinds = {name: arrays[name].dtype for name in arrays.files if arrays[name].ndim}
    rounded = [f"{name} is {kind}" for name, kind in kinds.items() if kind.kind in "iub"]
    if rounded:
        raise NotWeights(f"{_some(rounded)}: quantized; export the float weights")
    return None


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _some(texts: list[str]) -> str:
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
