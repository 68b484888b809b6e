"""Test that closed, full or ASCII-only streams do not stop a command, and that its exit status is right."""

import json
import os
import sys
from pathlib import Path

import pytest
from fresh import COMMAND, in_shell
from tiny_runs import LATE, make_config

from moe_bsr import config as configuration
from moe_bsr.api import train
from moe_bsr.cli import main as main_module
from moe_bsr.cli import streams
from moe_bsr.cli.main import in_flags, main, message_of
from moe_bsr.runs import folder as run
from moe_bsr.runs import report

pytestmark = pytest.mark.usefixtures("bare")


@pytest.fixture
def written(tmp_path) -> str:
    (tmp_path / "tiny.yaml").write_text(configuration.dump(make_config(tmp_path, **LATE, train__steps=2)))
    return str(tmp_path / "tiny.yaml")


@pytest.mark.parametrize("redirected", ["| head -1 >&2", ">/dev/full 2>/dev/full", "<&- >&- 2>&-"])
def test_training_does_not_need_its_streams(written, tmp_path, redirected):
    done = in_shell(redirected, COMMAND, "train", written, "train.pictures=false", "--run", tmp_path / "run")
    assert done.stdout.split() == ["0"] and "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert report.read(tmp_path / "run")["status"] == "finished"
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["task"] for line in lines)  # nothing was printed into a file of the run


@pytest.mark.parametrize(("redirected", "fails"), [("| head -0 >&2", False), (">/dev/full", True)])
def test_a_full_disk_for_stdout_is_a_failure_and_a_closed_pipe_is_not(redirected, fails):
    done = in_shell(redirected, COMMAND, "configs")
    assert (done.stdout.split() != ["0"]) == ("No space left on device" in done.stderr) == fails
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_characters_that_a_stream_cannot_encode_raise_no_error(monkeypatch):
    stream = open(os.devnull, "w", encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys.modules["warnings"], "showwarning", None)
    monkeypatch.setattr(sys.modules["threading"], "excepthook", None)
    streams.set_up("moe-bsr evaluate", quiet_output=False)
    print("été \udcff", file=sys.stdout)
    assert sys.stdout is stream and isinstance(sys.stderr, streams.Quiet)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """Return a run whose newest checkpoint is damaged. The one before is evaluated, with a warning on stderr."""
    folder = tmp_path_factory.mktemp("damaged")
    train(make_config(folder, **LATE, train__steps=2, train__checkpoint_every=1), folder / "run", callbacks=[])
    (folder / "run" / "checkpoint" / "2" / "weights.safetensors").write_bytes(b"")
    return folder / "run"


def test_warnings_and_refusals_leave_stdout_to_the_json(damaged, capsys):
    with pytest.warns(UserWarning, match="weights.safetensors does not match its hash"):
        assert main(["evaluate", str(damaged), "--checkpoint", "last", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 1


def test_warnings_are_one_line_with_the_commands_name(damaged):
    done = in_shell("", COMMAND, "evaluate", damaged, "--checkpoint", "last", "--json")
    assert json.loads(done.stdout.removesuffix("0\n"))["step"] == 1
    (line,) = [line for line in done.stderr.splitlines() if "does not match" in line]
    assert ": warning: checkpoint refused: " in line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(2, "No such file or directory", "runs/x"), "runs/x: No such file or directory"),
        (ValueError("two\nlines"), "two lines"),
        (OSError("of our own"), "of our own"),
    ],
)
def test_an_error_message_is_one_line(error, line):
    assert message_of(error) == line


def test_the_checkpoint_argument_becomes_a_flag():
    assert in_flags("checkpoint_name='last' takes the newest") == "--checkpoint last takes the newest"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("could not create a primitive")])
def test_too_little_memory_gives_one_line_and_status_1(monkeypatch, capsys, error):
    def short(arguments):
        raise error

    monkeypatch.setattr("moe_bsr.cli.configs.run", short)
    assert main(["configs"]) == main_module.FAILED
    text = capsys.readouterr().err
    assert "out of memory" in text and "batch_size" in text and len(text.splitlines()) == 1


# --- exit statuses of training ---


def train_status(written: str, folder: Path, capsys, *overrides: str) -> tuple[int, str]:
    status = main(["train", written, *overrides, "--run", str(folder)])
    error = capsys.readouterr().err
    assert len(error.splitlines()) <= 1 and "Traceback" not in error
    return status, error


def test_too_little_memory_for_an_update_gives_status_1_with_advice(written, tmp_path, monkeypatch, capsys):
    from moe_bsr.training import task_updates

    def short(*arguments, **keywords):
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(task_updates, "accumulate", short)
    status, error = train_status(written, tmp_path / "run", capsys)
    assert status == 1 and "last good checkpoint: none was written yet" in error
    assert all(word in error for word in ("train.batch_size", "train.grad_accumulation_steps", "storage"))


def test_a_metrics_file_that_vanishes_during_training_gives_status_1(written, tmp_path, monkeypatch, capsys):
    from tiny_runs import act_at

    act_at(monkeypatch, 2, (tmp_path / "run" / "metrics.jsonl").unlink)
    status, error = train_status(written, tmp_path / "run", capsys)
    assert status == 1 and "metrics.jsonl: No such file or directory" in error and "--resume" in error


def test_a_folder_that_cannot_be_created_gives_status_2(written, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    status, error = train_status(written, tmp_path / "file" / "run", capsys)
    assert status == 2 and str(tmp_path / "file") in error


@pytest.mark.parametrize("override", ["runtime.threads=10000", "runtime.device=meta"])
def test_an_invalid_runtime_gives_status_2(written, tmp_path, capsys, override):
    status, error = train_status(written, tmp_path / "run", capsys, override)
    assert status == 2 and override.partition("=")[0] in error and not (tmp_path / "run").exists()


def test_a_full_disk_when_the_report_is_written_gives_status_1(written, tmp_path, monkeypatch, capsys):
    def full(folder, result):
        raise OSError(f"{folder / 'report.md'} cannot be written: No space left on device; make room there")

    monkeypatch.setattr(report, "write", full)
    status, error = train_status(written, tmp_path / "run", capsys)
    assert status == 1 and "report.md cannot be written" in error and "checkpoint/2; then go on with --resume" in error
    assert run.test_evaluations(tmp_path / "run") == 1
