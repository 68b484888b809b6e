"""The console output of a run."""

import io
import re
import sys
from types import SimpleNamespace

import pytest

from moe_bsr.callbacks.console import Console
from moe_bsr.training.callback import EvalEvent, StepEvent


def follow(tasks: list[str], steps: int, order=None, about=(), first: int = 0) -> None:
    """Pass a run to the console: loss 2 s and accuracy s / 1000 at update s, and one evaluation at the end."""
    console = Console()
    console.restore({})
    config = SimpleNamespace(train=SimpleNamespace(steps=steps))
    console.on_start(SimpleNamespace(tasks=tasks, config=config, step=first, about=about))
    for step in range(first + 1, steps + 1):
        for task in order(step) if order else [tasks[(step - 1) % len(tasks)]]:
            metrics = {"loss": 2.0 * step, "accuracy": step / 1000, "lr": 1e-3}
            progress = {name: {"epochs": step / (10 * (i + 1))} for i, name in enumerate(tasks)}
            console.on_step(StepEvent(step, task, metrics, progress, [], 50.0))
    scores = {task: {"top1": 10.0 * (i + 1)} for i, task in enumerate(tasks)}
    console.on_evaluate(EvalEvent(steps, "val", scores))
    console.close()


def rows(text: str, steps: int) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if re.match(rf"\s*\d+/{steps} ", line)]


def test_every_row_has_the_mean_of_every_task_although_each_ends_with_the_same_task(capsys):
    follow(["pets", "food", "flowers"], 120)  # rows every 6 updates: each row ends with the same task
    printed = capsys.readouterr().out
    *training, evaluated = rows(printed, 120)
    assert len(training) == 20
    for number, row in enumerate(training):
        first = 6 * number + 1
        means = [(2 * s + 3) for s in (first, first + 1, first + 2)]  # of updates s and s + 3
        assert [float(row[1 + 2 * i]) for i in range(3)] == means
        assert row[7] == "50" and ":" in row[8]  # images a second, time left
    assert evaluated == ["120/120", *"val 10.0% val 20.0% val 30.0% val mean 20.00%".split()]
    assert [name in printed for name in ("pets", "food", "flowers")] == [True] * 3


def test_columns_are_aligned(capsys):
    follow(["a", "a_name_that_is_long"], 40)
    lines = capsys.readouterr().out.splitlines()
    header, units, *others = lines
    for name in ("a", "a_name_tha\u2026"):
        end = re.search(rf"(?<=\s){name}(?=\s|$)", header).end()
        assert units[end - 3 : end] == "acc" and all(line[end - 1] == "%" for line in others)
    assert max(map(len, lines)) < 100


@pytest.mark.parametrize("joint", [True, False])
def test_a_row_has_a_dash_for_a_task_without_updates(capsys, joint):
    follow(["a", "b"], 20, order=lambda step: ["a", "b"] if joint else ["b"])
    first = rows(capsys.readouterr().out, 20)[0]
    assert first[1:3] == (["2.00", "0%"] if joint else ["-", "2.00"])


def test_many_tasks_are_summarized_by_mean_worst_and_best(capsys):
    tasks = [f"task{i}" for i in range(12)]
    follow(tasks, 240)
    printed = capsys.readouterr().out
    first, *_, evaluated = rows(printed, 240)
    assert first[1] == "13.00" and "worst task0 0%, task1 0%; best task11 1%, task10 1%" in printed
    assert evaluated[1:3] == ["val", "65.0%"] and "worst task0 10%, task1 20%; best task11 120%" in printed
    assert max(map(len, printed.splitlines())) < 130


def test_a_resumed_run_continues_its_rows(capsys):
    follow(["a"], 40, first=29)
    assert [row[0] for row in rows(capsys.readouterr().out, 40)[:2]] == ["30/40", "32/40"]


def test_letters_missing_in_the_encoding_and_control_characters_are_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    follow(["a"], 2, about=["in été/\x1b]0;x\x07\udce9"])
    stream.flush()
    assert stream.buffer.getvalue().decode().splitlines()[0] == r"in \xe9t\xe9/\x1b]0;x\x07\ufffd"
