"""List the configurations that come with the package, and those of ./configs.

    moe-bsr configs

Train one from any directory by this path: `moe-bsr train configs/quickstart.yaml`. A file of that path in the current
directory comes first. `moe-bsr copy quickstart` copies one here, to change it. `base` is for reading: it lists every
key with its default and its meaning.

Exit status: 0.
"""

import argparse
import textwrap
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> int:
    from moe_bsr.config import packaged

    files = {name: packaged.folder("configs") / f"{name}.yaml" for name in packaged.names("configs")}
    files |= {path.stem: path for path in sorted(Path("configs").glob("*.yaml"))}
    width = max(map(len, files))
    for name, file in files.items():
        first, *more = textwrap.wrap(summary(file.read_text(encoding="utf-8")), 116 - width) or [""]
        print(f"{name.ljust(width)}  {first}" + "".join(f"\n{'':<{width}}  {line}" for line in more))
    return 0


def summary(text: str) -> str:
    """Return the first sentence of the comment at the start of a file, without the lines that show a command."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith(("# python ", "# moe-bsr ")):
            lines.append(line.lstrip("# "))
    return " ".join(lines).partition(". ")[0].removesuffix(".")
