"""Test the command line as a whole: help of all commands, error messages, scripts in tools/ and process setup."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import moe_bsr
from moe_bsr.cli.main import COMMANDS, in_flags, main, program

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "timm", "numpy", "yaml", "PIL", "moe_bsr.config"}
FRONTS = {"expert_views": "views"}


def python(*arguments: str | Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_commands_help_says_what_it_does_and_shows_how(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"    moe-bsr {command}" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = (
        "import contextlib, sys\n"
        "from moe_bsr.cli.main import COMMANDS, main\n"
        "for command in ['', *COMMANDS]:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main([*command.split(), '--help'])\n"
        f"    assert not {HEAVY!r} & sys.modules.keys(), command\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert all(f"  {command} " in done.stdout for command in COMMANDS)


def test_help_takes_less_than_half_a_second_of_the_processor():
    code = (
        "import contextlib, resource\n"
        "from moe_bsr.cli.main import main\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(['train', '--help'])\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(usage.ru_utime + usage.ru_stime)\n"
    )
    assert float(python("-c", code).stdout.splitlines()[-1]) < 0.5


def test_the_version_is_the_packages():
    assert python("-m", "moe_bsr", "--version").stdout == f"moe-bsr {moe_bsr.__version__}\n"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["trian"], "no command 'trian'; did you mean 'train'?"),
        (["xyz"], "no command 'xyz'; see moe-bsr --help"),
        (["train"], "the following arguments are required: CONFIG"),
        (["evaluate", "runs/x", "--batch-size", "0"], "0: at least 1"),
    ],
)
def test_unknown_commands_and_invalid_arguments_exit_with_status_2(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "views", "compare"])
def test_a_refusal_is_one_line_with_the_commands_name(command, tmp_path, capsys):
    assert main([command, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"moe-bsr {command}: {tmp_path}") and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "python, flags",
    [
        ("go on with it by resume=True, or name", "go on with it by --resume, or name"),
        (
            "backbone.weights=FILE to resume, weights=FILE to load",
            "backbone.weights=FILE to resume, --weights FILE to load",
        ),
        ("leave out what cannot be read (skip_unreadable=True)", "leave out what cannot be read (--skip-unreadable)"),
        ("on it; device='cpu' computes without it", "on it; --device cpu computes without it"),
        ("those that are trained: tasks=['a', 'b-c']", "those that are trained: --task a b-c"),
        ("tasks = ['a']: each task once", "tasks = ['a']: each task once"),
    ],
)
def test_arguments_in_error_messages_become_flags(python, flags):
    assert in_flags(python) == flags


def test_a_missing_extra_is_named_with_how_to_install_it(monkeypatch, capsys):
    def need(arguments):
        import matplotlib.figure  # noqa: F401

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("moe_bsr.cli.configs.run", need)
    assert main(["configs"]) == 2
    assert capsys.readouterr().err == "moe-bsr configs: needs matplotlib: pip install 'moe_bsr[views]'\n"


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_bsr.cli.configs.run", interrupt)
    assert main(["configs"]) == 130
    assert capsys.readouterr().err == "moe-bsr configs: interrupted\n"


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.stem)
def test_each_script_in_tools_starts_one_command(path):
    command = re.search(r'start\("(.+)"\)', path.read_text())[1]
    assert command in COMMANDS and command == FRONTS.get(path.stem, path.stem)


def test_usage_shows_the_program_as_it_was_started(monkeypatch):
    for started, called in (
        ("/usr/bin/moe-bsr", "moe-bsr train"),
        ("tools/train.py", "python tools/train.py"),
        ("/x/moe_bsr/__main__.py", "python -m moe_bsr train"),
    ):
        monkeypatch.setattr(sys, "argv", [started])
        assert program("train") == called
    assert python(ROOT / "tools" / "train.py", "-h").stdout.startswith(f"usage: python {ROOT / 'tools' / 'train.py'}")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "glibc.malloc.tcache_count=0"),
        ("glibc.malloc.perturb=1", "glibc.malloc.perturb=1:glibc.malloc.tcache_count=0"),
        ("glibc.malloc.tcache_count=3", "glibc.malloc.tcache_count=3"),
    ],
)
def test_a_program_restarts_with_the_allocator_setting_and_the_same_arguments(tmp_path, before, after):
    file = tmp_path / "program.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from moe_bsr.runtime import allocator\nallocator.start_again()\n"
        "import os\nprint(os.environ['GLIBC_TUNABLES'], sys.argv[1:], sys.flags.optimize)\n"
    )
    done = python("-O", file, "a b", "--c", env={"GLIBC_TUNABLES": before})
    assert done.stdout == f"{after} ['a b', '--c'] 1\n"


def test_only_computing_commands_with_their_own_process_set_it_up(monkeypatch):
    changed = []
    monkeypatch.setattr("moe_bsr.cli.main._set_up_process", lambda: changed.append(1))
    for module in ("evaluate", "compare"):
        monkeypatch.setattr(f"moe_bsr.cli.{module}.run", lambda arguments: 0)
    main(["evaluate", "RUN"])
    main(["compare", "RUN"], own_process=True)
    assert not changed
    main(["evaluate", "RUN"], own_process=True)
    assert changed == [1]
