"""Dispatch the commands: `moe-bsr COMMAND ...`, `python -m moe_bsr COMMAND ...` and the programs in tools/.

Each command is a module of this package, named like the command with `_` for `-`. Its docstring is the help text,
`add_arguments(parser)` declares the arguments, and `run(arguments)` does the work and returns the exit status.
Its top-level imports must be cheap, because torch takes seconds to load and --help should not wait for it.
"""

import argparse
import difflib
import gc
import importlib
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import NoReturn

import moe_bsr
from moe_bsr.cli import streams
from moe_bsr.cli.terminal import say
from moe_bsr.runtime.names import printable

GROUPS = {  # of `moe-bsr --help`
    "prepare images and configurations": {
        "init": "write the task files and the configuration to train on your image folders",
        "check": "open all images of tasks, and list those that cannot be read",
        "pack": "pack the images of a task into one file per split, which is faster to read",
        "tasks": "list the available tasks, or those of a run",
        "configs": "list the configurations that come with the package",
        "copy": "copy a packaged configuration or task file here, to change it",
    },
    "train": {
        "fit": "find the best model for your time and memory, from a linear probe upwards, and say why",
        "train": "train several tasks as a configuration says, and write a run folder",
        "probe": "train only the heads, to their optimum, in one pass over the images: try this first",
        "lr": "search for a learning rate: raise it, and see where the loss falls fastest",
        "add-task": "add a task to a finished run: train its head and routers, keep everything else frozen",
        "remove-task": "remove tasks from a finished run",
    },
    "use a trained run": {
        "evaluate": "measure the accuracy of a run, task by task",
        "predict": "name what images show, for all tasks of a run at once",
        "reject": "teach a run to recognize images that belong to none of its tasks; predict then says so",
        "views": "draw how a run uses experts and patches, and open TensorBoard on it",
        "compare": "compare finished runs in one table",
        "export": "write a run for a device: ONNX graphs, labels, and a program that needs no torch",
        "share": "write a run for somebody else: zip file, folder, Hugging Face repository or timm model",
    },
    "predict costs and compare methods": {
        "cost": "predict memory and FLOPs of a configuration, and list plans that fit into a memory size",
        "drops": "measure what dropping tokens costs in accuracy before training, and where it costs less",
        "gradients": "measure what each storage saves for the backward pass, and the error of its gradients",
        "budgets": "measure accuracy after some minutes of training: fit against the usual methods",
        "sweep": "compare configurations at equal updates over several seeds, with intervals",
        "compare-methods": "compare all methods on one backbone: memory, FLOPs, time, gradients, accuracy",
        "benchmark": "measure time and memory of a training step, beside timm and the public form of BSR",
    },
    "maintain this package": {
        "selftest": "test it against kills, damaged runs, broken configurations and hostile files",
        "reproduce": "recompute the cost figures of the BSR paper's tables",
        "pretrain": "train the bundled backbone again",
        "results": "write results/README.md from the reports in results/",
    },
}
COMMANDS = {command: summary for group in GROUPS.values() for command, summary in group.items()}

# Commands that train or evaluate in this process. The C library's allocator has to be set up before they start.
COMPUTING = {"fit", "train", "probe", "lr", "drops", "gradients", "evaluate", "reject", "export", "views", "pretrain"}
COMPUTING |= {"add-task", "budgets", "compare-methods", "cost", "sweep"}

# Packages that only some commands need, and the extra of moe_bsr that installs each.
EXTRAS = {"matplotlib": "views", "scipy": "views", "onnx": "export", "onnxruntime": "export"}
EXTRAS |= {"datasets": "huggingface", "urllib3": "urls"}

FAILED, REFUSED, INTERRUPTED = 1, 2, 130


def start(command: str | None = None) -> NoReturn:
    """Run the command line of this process, and exit with its status.

    Args:
        command: the command to run; if None, the first argument names it.
    """
    arguments = sys.argv[1:] if command is None else [command, *sys.argv[1:]]
    name = arguments[0] if arguments else ""
    streams.set_up(program(name).strip(), quiet_output=name in ("train", "probe", "add-task"))
    status = main(arguments, own_process=True)
    if (failed := streams.finish()) is not None:
        if failed:  # empty if the reader, such as head, has closed the pipe: that is no failure
            print(f"{program(name)}: {failed}", file=sys.stderr)
        status = status or bool(failed) * FAILED
    sys.exit(status)


def main(arguments: list[str], own_process: bool = False) -> int:
    """Run a command line in this process, and return its exit status.

    Args:
        own_process: True if the process may be set up for the command. Otherwise nothing global changes.
    Raises:
        SystemExit: after --help or --version, and for invalid arguments (status 2).
    """
    name, *rest = arguments or ["--help"]
    if name in COMMANDS:
        return _run(name, rest, own_process)
    parser = argparse.ArgumentParser(
        prog="moe-bsr",
        description="Fine-tune one Vision Transformer for several image-classification tasks.",
        epilog="\n\n".join(
            f"{group}:\n" + "\n".join(f"  {command:<16}{summary}" for command, summary in commands.items())
            for group, commands in GROUPS.items()
        )
        + "\n\n`moe-bsr COMMAND --help` describes a command. To start: moe-bsr train configs/quickstart.yaml"
        + "\n\nExit status: 0 success, 1 failure, 2 invalid arguments or input, 130 interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", help="one of the commands below")
    parser.add_argument("--version", action="version", version=f"moe-bsr {moe_bsr.__version__}")
    parser.parse_args([name])
    near = difflib.get_close_matches(name, COMMANDS, 1)
    parser.error(f"no command {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; see moe-bsr --help"))


def program(command: str) -> str:
    """Return how a user starts a command: `moe-bsr COMMAND`, or in the way this process was started."""
    path = Path(sys.argv[0])
    if path.suffix == ".py" and path.parent.name == "tools":
        return f"python {path}"
    if path.parts[-2:] == ("moe_bsr", "__main__.py"):
        return f"python -m moe_bsr {command}"
    return f"moe-bsr {command}"


def in_flags(message: str) -> str:
    """Rewrite the Python arguments in a message of the library, such as `resume=True`, as command-line flags."""
    for said, flag in (("resume=True", "--resume"), ("skip_unreadable=True", "--skip-unreadable")):
        message = message.replace(said, flag)
    message = message.replace("checkpoint_name='last'", "--checkpoint last")
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
        prog=program(name),
        description=_filled(module.__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parsed = parser.parse_intermixed_args(rest)
    if own_process and name in COMPUTING:
        _set_up_process()
    try:
        return module.run(parsed)
    except MemoryError as error:
        return _out_of_memory(parser.prog, str(error))
    except BrokenPipeError:  # the reader of stdout has closed it
        return 0
    except _expected_errors() as error:
        say(f"{parser.prog}: {printable(in_flags(message_of(error)))}", error=True)
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


def _filled(text: str) -> str:
    """Wrap the paragraphs of a help text to the terminal's width. Those with an indented line stay as they are."""
    width = min(shutil.get_terminal_size().columns - 2, 118)
    paragraphs = text.strip().split("\n\n")
    return "\n\n".join(part if "\n " in f"\n{part}" else textwrap.fill(part, width) for part in paragraphs)


def _out_of_memory(prog: str, said: str) -> int:
    smaller = "free some, or use smaller batches (train.batch_size, --batch-size)"
    print(f"{prog}: out of memory ({said or 'no more is available'}); {smaller}", file=sys.stderr)
    return FAILED


def message_of(error: Exception) -> str:
    """Return the message of an exception on one line; that of an OSError begins with the file."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _set_up_process() -> None:
    """Set up the allocator, the garbage collector and torch for a process of our own; a library must not do this."""
    from moe_bsr.runtime import allocator

    allocator.start_again()  # replaces this process once; returns if that was done. torch is not loaded yet.

    gc.disable()  # imported objects stay alive, and searching them for garbage takes a quarter of the start-up
    import moe_bsr.api  # noqa: F401
    from moe_bsr.runtime.device import tune_process

    gc.freeze()
    gc.enable()
    tune_process()


def _expected_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions whose message is enough for the user. Any other is a bug and keeps its traceback."""
    from moe_bsr.runs.checkpoint import CheckpointError
    from moe_bsr.runtime.interrupt import RankLost

    return ValueError, OSError, CheckpointError, FloatingPointError, RankLost
