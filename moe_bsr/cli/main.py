"""Runs the commands: `moe-bsr COMMAND ...`, `python -m moe_bsr COMMAND ...` and the programs of tools/.

A command is a file of this folder, named as the command with `_` for `-`. Its docstring is its help text,
`add_arguments(parser)` declares its arguments, and `run(arguments)` does the work and returns the exit status.
At its top it imports the standard library only: torch takes seconds to load, and --help should not wait for it.
"""

import argparse
import difflib
import gc
import importlib
import re
import sys
from pathlib import Path
from typing import NoReturn

import moe_bsr
from moe_bsr.cli import streams
from moe_bsr.cli.terminal import say
from moe_bsr.runtime.names import printable

COMMANDS = {
    "fit": "the best model for some minutes and megabytes: tries, from a linear probe upwards, and says why",
    "train": "train several tasks as a configuration says, and write a run folder",
    "probe": "train the heads alone, to their optimum, in one pass over the images: the first thing to try",
    "lr": "look for a learning rate: the loss while it rises, and where it falls fastest",
    "evaluate": "accuracy of a run, task by task",
    "predict": "name what is on images, for all tasks of a run at once",
    "reject": "learn to tell what belongs to none of a run's tasks; predict says it from then on",
    "export": "write a run for a device: ONNX graphs, weights, labels, a model card, a program without torch",
    "views": "draw what a run does with experts and patches, and open TensorBoard on it",
    "compare": "set finished runs side by side",
    "compare-methods": "all methods on one backbone: memory, FLOPs, time, gradients, accuracy; a table and a picture",
    "cost": "memory and FLOPs of a configuration before anyone trains it; plans that fit into a memory",
    "drops": "what dropping tokens costs in accuracy before training, and where to drop instead",
    "gradients": "what each storage keeps for the backward pass, and how near its gradients come",
    "add-task": "teach a finished run one task more: one head and one router per layer, all else frozen",
    "remove-task": "take tasks out of a finished run",
    "share": "a run as a zip file, a folder, a hub's repository or a timm model, for somebody else",
    "init": "look at image folders and write the task files and the configuration to train on them",
    "tasks": "list the tasks there are, or those of a run",
    "configs": "list the configurations that come with the package",
    "copy": "copy a packaged configuration or task file here, to change it",
    "check": "open all images of tasks and list at once what cannot be read",
    "pack": "pack a task's images into one file per split",
    "budgets": "accuracy after so many minutes: of fit, and of what somebody would train in its place",
    "benchmark": "time and memory of a training step, beside timm and the public form of BSR",
    "reproduce": "rebuild the cost figures of the BSR paper's tables",
    "pretrain": "make the bundled backbone anew",
    "sweep": "arms at equally many images with several seeds: what differs, in pairs, with intervals",
    "selftest": "attack the product: kills, damaged runs, broken configurations, hostile files",
    "results": "write results/README.md from the reports in results/",
}

# Those that train or evaluate in this process: they need the C library's allocator set up first.
COMPUTING = {"fit", "train", "probe", "lr", "drops", "gradients", "evaluate", "reject", "export", "views", "pretrain"}
COMPUTING |= {"add-task", "budgets", "compare-methods", "cost", "sweep"}

# Packages that only some commands need, and the extra that installs them.
EXTRAS = {"matplotlib": "views", "scipy": "views", "onnx": "export", "onnxruntime": "export"}
EXTRAS |= {"datasets": "huggingface", "urllib3": "urls"}

FAILED, REFUSED, INTERRUPTED = 1, 2, 130


def start(command: str | None = None) -> NoReturn:
    """The whole life of a process: run what its arguments say, or that command with them, and exit."""
    arguments = sys.argv[1:] if command is None else [command, *sys.argv[1:]]
    name = arguments[0] if arguments else ""
    streams.set_up(program(name).strip(), quiet_output=name in ("train", "probe", "add-task"))
    status = main(arguments, own_process=True)
    if (failed := streams.finish()) is not None:  # a reader that has seen enough (head) is no failure
        if failed:
            print(f"{program(name)}: {failed}", file=sys.stderr)
        status = status or bool(failed) * FAILED
    sys.exit(status)


def main(arguments: list[str], own_process: bool = False) -> int:
    """Run a command line in this process; returns the exit status.

    Args:
        own_process: whether the process may be set up for the command. Otherwise nothing global changes.
    Raises:
        SystemExit: after --help or --version, and for arguments that no parser knows (status 2).
    """
    name, *rest = arguments or ["--help"]
    if name in COMMANDS:
        return _run(name, rest, own_process)
    parser = argparse.ArgumentParser(
        prog="moe-bsr",
        description="Fine-tune one Vision Transformer for several image-classification tasks.",
        epilog="commands:\n"
        + "\n".join(f"  {command:<16}{what}" for command, what in COMMANDS.items())
        + "\n\nmoe-bsr COMMAND --help says more. To begin with: moe-bsr train configs/quickstart.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", help="one of those below")
    parser.add_argument("--version", action="version", version=f"moe-bsr {moe_bsr.__version__}")
    parser.parse_args([name])
    near = difflib.get_close_matches(name, COMMANDS, 1)
    parser.error(f"no command {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; see moe-bsr --help"))


def program(command: str) -> str:
    """How a person starts a command, in the way this process was started."""
    path = Path(sys.argv[0])
    if path.suffix == ".py" and path.parent.name == "tools":
        return f"python {path}"
    if path.parts[-2:] == ("moe_bsr", "__main__.py"):
        return f"python -m moe_bsr {command}"
    return f"moe-bsr {command}"


def in_flags(message: str) -> str:
    """A message of the library, whose arguments are Python's (`resume=True`), as the command line spells them."""
    message = message.replace("resume=True", "--resume").replace("checkpoint_name='last'", "--checkpoint last")
    message = re.sub(
        r"(?<![\w.])(weights|device|data_root)='?([^\s',;]+)'?", lambda m: f"--{m[1].replace('_', '-')} {m[2]}", message
    )
    return re.sub(r"(?<![\w.])tasks=\[([^]]*)\]", lambda m: "--task " + re.sub("[',]", "", m[1]), message)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if key := re.search(r"--(\w+(\.\w+)+)(=| |$)", message):
            message += f"; a key of the configuration is set without dashes: {key[1]}=VALUE"
        super().error(message)


def _run(name: str, rest: list[str], own_process: bool) -> int:
    module = importlib.import_module(f"moe_bsr.cli.{name.replace('-', '_')}")
    parser = _Parser(
        prog=program(name), description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    parsed = parser.parse_intermixed_args(rest)
    if own_process and name in COMPUTING:
        _set_up_process()
    try:
        return module.run(parsed)
    except MemoryError as error:
        return _out_of_memory(parser.prog, str(error))
    except BrokenPipeError:  # nobody reads any more
        return 0
    except _expected_errors() as error:
        say(f"{parser.prog}: {printable(in_flags(told(error)))}", error=True)
        return REFUSED
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        say(f"{parser.prog}: needs {package}: pip install 'moe_bsr[{EXTRAS[package]}]'", error=True)
        return REFUSED
    except KeyboardInterrupt:
        say(f"{parser.prog}: interrupted", error=True)
        return INTERRUPTED
    except RuntimeError as error:
        from moe_bsr.runtime import memory

        if not memory.is_short(error):
            raise
        return _out_of_memory(parser.prog, memory.described(error))


def _out_of_memory(prog: str, said: str) -> int:
    smaller = "free some, or take smaller batches (train.batch_size, --batch-size)"
    print(f"{prog}: out of memory ({said or 'no more is to be had'}); {smaller}", file=sys.stderr)
    return FAILED


def told(error: Exception) -> str:
    """An exception's message in one line; of the system's errors the file first."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _set_up_process() -> None:
    """What a program may do to its process, and a library may not: the C library's allocator, Python's collector."""
    from moe_bsr.runtime import allocator

    allocator.start_again()  # returns in the second life; torch is not loaded yet

    gc.disable()  # what is imported stays: looking for garbage among it takes a quarter of the start
    import moe_bsr.api  # noqa: F401
    from moe_bsr.runtime.device import tune_process

    gc.freeze()
    gc.enable()
    tune_process()


def _expected_errors() -> tuple[type[Exception], ...]:
    """Those whose message says all there is to say; anything else is a fault of ours and keeps its traceback."""
    from moe_bsr.runs.checkpoint import CheckpointError
    from moe_bsr.runtime.interrupt import RankLost

    return ValueError, OSError, CheckpointError, FloatingPointError, RankLost
