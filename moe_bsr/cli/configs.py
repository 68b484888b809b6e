"""List the configurations that come with the package, and those of ./configs.

    moe-bsr configs

Train one by its name from any directory, moe-bsr train configs/quickstart.yaml; the file of that path is used
where there is one. `moe-bsr copy quickstart` copies one here, to change it. Without names, `base` is meant
to be read: it lists every key with its default and what it means.
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
    """The first sentence of the comment that a file starts with; lines that are a command are passed over."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith(("# python ", "# moe-bsr ")):
            lines.append(line.lstrip("# "))
    return " ".join(lines).partition(". ")[0].removesuffix(".")
