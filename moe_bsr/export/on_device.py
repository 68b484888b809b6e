"""Classify images for all tasks at once. Needs only numpy, Pillow and onnxruntime (or ExecuTorch).

    python predict.py photo.jpg folder/          all tasks, one line each
    python predict.py photo.jpg --task NAME      one task, or several
    python predict.py --check                    compare this machine's answers with the exported run's
    python predict.py --time                     milliseconds per image and memory, on this machine

This program is part of a bundle and needs no other code, only the bundle's config.json, graphs and weights. Exit
status: 0 success, 1 an image could not be read or the check failed, 2 refused. As a module it has `Bundle`:

    names = Bundle(".").predict(Image.open("photo.jpg"))
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SMALL_IMAGE_SIDE = 64  # square images up to this size are not cropped
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"}
CHECK_IMAGES = 8


class Refused(Exception):
    """An error whose message is meant for the user, without a traceback."""


class Bundle:
    """A folder that `moe-bsr export` wrote.

    Args:
        tasks: tasks to use, by default all. For a single one only its own graph is loaded.
        threads: number of threads, 0 for onnxruntime's choice. ExecuTorch always chooses itself.
    Raises:
        Refused: a file is missing, damaged or of another export, or a task is unknown.
    """

    def __init__(self, folder: str | Path, tasks: list[str] | None = None, threads: int = 0) -> None:
        self.folder = Path(folder)
        self.config = self._json("config.json")
        known = list(self.config["tasks"])
        for task in tasks or []:
            if task not in known:
                raise Refused(f"no task {task!r}: this bundle has {', '.join(known)}")
        self.tasks = list(dict.fromkeys(tasks or known))
        self.labels = {task: self.config["tasks"][task]["label_names"] for task in self.tasks}
        one = self.config["all_tasks"] if len(self.tasks) > 1 else None
        graphs = {task: one or self.config["tasks"][task]["graph"] for task in self.tasks}
        for graph in dict.fromkeys(graphs.values()):
            for file in (graph, *self.config["data_files"].get(graph, ())):
                self._require(file)
        paths = {task: self.folder / graph for task, graph in graphs.items()}
        first = paths[self.tasks[0]]
        programs = first.suffix == ".pte"
        self._computes = Programs(paths) if programs else Graph(first, threads, self.config["sha256"])

    def logits(self, inputs: np.ndarray, tasks: list[str] | None = None) -> dict[str, np.ndarray]:
        """Return logits (B, classes) by task for normalized float32 images (B, 3, S, S). Shared blocks run once.

        Args:
            tasks: tasks to compute, by default all that were loaded.
        """
        return self._computes.logits(inputs, tasks or self.tasks)

    def predict(self, image: Image.Image, top: int = 3) -> dict[str, list[dict]]:
        """Return the most probable class names of an image: {task: [{name, probability}, ...]}."""
        answers = {}
        for task, row in self.logits(self.normalize(self.pixels(image)[None])).items():
            scores = row[0].astype(np.float64)
            probabilities = np.exp(scores - scores.max())
            probabilities /= probabilities.sum()
            best = np.argsort(-probabilities, kind="stable")[:top]
            answers[task] = [{"name": self.labels[task][i], "probability": float(probabilities[i])} for i in best]
        return answers

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Turn an image into uint8 (3, S, S): upright, on white, resized and cropped as in the run's evaluation."""
        image = upright_rgb(image)
        about, size = self.config["pretrained_cfg"], self.config["pretrained_cfg"]["input_size"][-1]
        how = Image.Resampling.BICUBIC if about["interpolation"] == "bicubic" else Image.Resampling.BILINEAR
        width, height = image.size
        if about["resize"] == "squash" or height == width <= SMALL_IMAGE_SIDE:
            return np.asarray(image.resize((size, size), how), np.uint8).transpose(2, 0, 1)
        side = math.floor(size / about["crop_pct"])
        if about["crop_mode"] == "squash":
            width = height = side
        elif about["crop_mode"] == "border":
            scale = max(width, height) / side
            width, height = max(round(width / scale), 1), max(round(height / scale), 1)
        elif height <= width:
            width, height = int(side * width / height), side
        else:
            width, height = side, int(side * height / width)
        image = image.resize((width, height), how)
        if about["crop_mode"] == "border":
            mean = tuple(round(255 * value) for value in about["mean"])
            square = Image.new("RGB", (max(width, size), max(height, size)), mean)
            square.paste(image, ((square.width - width) // 2, (square.height - height) // 2))
            image = square
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
        return np.asarray(image.crop((left, top, left + size, top + size)), np.uint8).transpose(2, 0, 1)

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """Turn uint8 (B, 3, S, S) into the graph's inputs, float32."""
        about = self.config["pretrained_cfg"]
        mean, std = (np.array(about[key], np.float32).reshape(3, 1, 1) * np.float32(255) for key in ("mean", "std"))
        return (pixels.astype(np.float32) - mean) / std

    def check(self) -> dict:
        """Compare this machine's logits for drawn images with those of the exported run.

        Returns:
            ok, and tasks: by task the result of `compare` and its own ok.
        """
        about, size = self._json("parity.json"), self.config["pretrained_cfg"]["input_size"][-1]
        found = self.logits(self.normalize(check_images(size)))
        report = {"ok": True, "tasks": {}}
        for task in self.tasks:
            result = compare(np.array(about["check"]["logits"][task], np.float32), found[task])
            if self.config["precision"] == "float32":
                result["ok"] = result["difference"] <= result["tolerance"] and not result["decided_otherwise"]
            else:  # int8 rounds differently on other processors, and a token may then go to another expert
                result["ok"] = result["equal"] >= about["check"]["least_equal"]
            report["tasks"][task] = result
            report["ok"] = report["ok"] and result["ok"]
        return report

    def _json(self, name: str) -> dict:
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise Refused(f"{self.folder / name}: cannot be read ({error}); is this the folder of a bundle?") from None

    def _require(self, name: str) -> None:
        """Check that a file is the one that was exported."""
        path = self.folder / name
        if not path.is_file():
            raise Refused(f"{path}: missing; copy the whole bundle")
        if sha256(path) != self.config["sha256"][name]:
            raise Refused(f"{path}: damaged, or of another export (its sha256 is not the one in config.json)")


class Graph:
    """ONNX graph of one task or of all tasks, run by onnxruntime."""

    def __init__(self, path: Path, threads: int, sha256: dict[str, str]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise Refused(f"{path}: onnxruntime cannot load it: {error}") from None
        data = json.loads(self.session.get_modelmeta().custom_metadata_map["data_sha256"])
        if wrong := [file for file in data if data[file] != sha256[file]]:
            raise Refused(f"{path}: made for another {wrong[0]}; export the run again")
        self._options = onnxruntime.RunOptions()
        self._options.only_execute_path_to_fetches = True  # compute only the requested tasks

    def logits(self, inputs: np.ndarray, tasks: list[str]) -> dict[str, np.ndarray]:
        return dict(zip(tasks, self.session.run(tasks, {"images": inputs}, self._options)))  # noqa: B905, old Pythons


class Programs:
    """ExecuTorch programs, one per task. Each takes one image at a time."""

    def __init__(self, paths: dict[str, Path]) -> None:
        import torch
        from executorch.runtime import Runtime

        self._tensor, self._programs = torch.tensor, {}
        for task, path in paths.items():
            try:
                self._programs[task] = Runtime.get().load_program(path)
                self._programs[task].load_method("forward")
            except Exception as error:
                raise Refused(f"{path}: ExecuTorch cannot load it: {error}") from None

    def logits(self, inputs: np.ndarray, tasks: list[str]) -> dict[str, np.ndarray]:
        images = [(self._tensor(inputs[i : i + 1]),) for i in range(len(inputs))]
        methods = {task: self._programs[task].load_method("forward") for task in tasks}
        # Copied, because the next image's logits are written into the same memory.
        return {task: np.concatenate([m.execute(x)[0].numpy().copy() for x in images]) for task, m in methods.items()}


def compare(expected: np.ndarray, found: np.ndarray) -> dict:
    """Compare two arrays of logits (B, C).

    Returns:
        difference: the largest one. tolerance: 1e-4 times the largest logit, at least 1e-4. equal: number of images
        with the same first class. decided_otherwise: number of images with another first class although that of
        `expected` leads by more than the tolerance. images: B.
    """
    tolerance = 1e-4 * max(1.0, float(np.abs(expected).max()))
    first, other = expected.argmax(1), found.argmax(1)
    ordered = np.sort(expected, 1)
    clear = ordered[:, -1] - ordered[:, -2] > tolerance
    return {
        "difference": float(np.abs(expected - found).max()),
        "tolerance": tolerance,
        "equal": int((first == other).sum()),
        "decided_otherwise": int((clear & (first != other)).sum()),
        "images": len(expected),
    }


def check_images(size: int) -> np.ndarray:
    """Draw images that are the same on every machine, uint8 (8, 3, S, S), so that a bundle needs no photos."""
    y, x = np.mgrid[:size, :size].astype(np.int64) * 224 // size
    images = []
    for k in range(CHECK_IMAGES):
        bands = [(3 + k) * x + (11 - k) * y, (7 * k + 1) * y - 2 * x, x * y // (40 + 9 * k)]
        images.append([np.abs((band * (1 + k % 3) + 60 * c) % 511 - 255) for c, band in enumerate(bands)])
    return np.array(images).astype(np.uint8)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB as a viewer shows it: rotated by its EXIF tag, transparent parts on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        raise Refused("its pixels have more than 8 bits: convert it to 8 (README.md says how, if a task needs it)")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(2**20):
            found.update(part)
    return found.hexdigest()


def memory_mb() -> float | None:
    """Return the resident memory of this process in MB (2^20 bytes), or None if the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")), None)


def measure(bundle: Bundle, repeats: int = 30) -> dict:
    """Measure one image: median milliseconds of wall clock (ms) and of CPU time (cpu_ms), and memory afterwards."""
    inputs = bundle.normalize(check_images(bundle.config["pretrained_cfg"]["input_size"][-1])[:1])
    wall, cpu = [], []
    for _ in range(repeats + 2):
        start = time.perf_counter(), time.process_time()
        bundle.logits(inputs)
        wall.append(1000 * (time.perf_counter() - start[0]))
        cpu.append(1000 * (time.process_time() - start[1]))
    return {"ms": float(np.median(wall[2:])), "cpu_ms": float(np.median(cpu[2:])), "memory_mb": memory_mb()}


def harmless(text: object) -> str:
    """Escape a name so that it cannot control the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def files_of(images: list[str]) -> list[Path]:
    """Return the named files, and the image files in and below the named folders."""
    files = []
    for name in map(Path, images):
        below = [name]
        if name.is_dir():
            litter = re.compile(r"(^|/)(\.|@eaDir/|__MACOSX/)")
            found = (f for f in name.rglob("*") if not litter.search(f.relative_to(name).as_posix()))
            below = sorted(file for file in found if file.suffix.lower() in PICTURES)
        if not below:
            raise Refused(f"{name}: no images below it")
        files += below
    return files


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="image file, or a folder of them")
    parser.add_argument("--task", nargs="+", action="extend", metavar="NAME", help="only these tasks (default: all)")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="class names per task (default: 3)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: onnxruntime's)")
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of text")
    parser.add_argument("--check", action="store_true", help="compare this machine with the exported run")
    parser.add_argument("--time", action="store_true", help="measure milliseconds per image and memory")
    given = parser.parse_intermixed_args(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # stderr does so by default
    try:
        if not (given.images or given.check or given.time):
            raise Refused("name an image or a folder; --check and --time need none")
        bundle = Bundle(Path(__file__).resolve().parent, given.task, given.threads)
        if given.check:
            return tell_check(bundle.check(), given.json)
        if given.time:
            measured = measure(bundle)
            text = f"{measured['ms']:.1f} ms per image ({measured['cpu_ms']:.1f} of CPU), {', '.join(bundle.tasks)}"
            text += "" if measured["memory_mb"] is None else f"; the process takes {measured['memory_mb']:.0f} MB"
            print(json.dumps(measured) if given.json else text)
            return 0
        return tell_names(bundle, given)
    except (Refused, ModuleNotFoundError) as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return 2


def tell_check(report: dict, as_json: bool) -> int:
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        for task, each in report["tasks"].items():
            print(
                f"{task}: {'ok' if each['ok'] else 'NOT what was exported'}: logits differ by {each['difference']:.1e} "
                f"(float32 allows {each['tolerance']:.1e}), {each['equal']} of {each['images']} first names equal"
            )
    return 0 if report["ok"] else 1


def tell_names(bundle: Bundle, given: argparse.Namespace) -> int:
    answers, unread = [], 0
    for file in files_of(given.images):
        try:
            with Image.open(file) as image:
                names = bundle.predict(image, given.top)
        except Exception as error:  # Pillow's plug-ins raise exceptions of many types for damaged files
            print(f"predict.py: {harmless(file)}: not a readable image ({harmless(error)})", file=sys.stderr)
            unread += 1
            continue
        answers.append({"image": str(file), "tasks": names})
        if not given.json:
            print(harmless(file))
            for task, best in names.items():
                found = (f"{harmless(name['name'])} {100 * name['probability']:.0f} %" for name in best)
                print(f"  {harmless(task)}  {', '.join(found)}")
    if given.json:
        print(json.dumps(answers, indent=1))
    return 1 if unread else 0


if __name__ == "__main__":
    sys.exit(main())
