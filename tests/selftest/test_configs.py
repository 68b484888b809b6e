"""The campaign of broken configurations: drawn from a seed, each really run, and judged as it ended."""

import os
import signal
import time

import pytest

from moe_bsr.cli.main import main
from moe_bsr.selftest.configs import FILES, GOOD, Mutant, judge, mutants, try_mutant
from moe_bsr.selftest.sandbox import Result, run

WHOLE = Mutant("nothing", {name: text.encode() for name, text in FILES.items()}, [])


def test_the_same_seed_gives_the_same_mutants_and_a_longer_campaign_begins_alike():
    first = list(mutants(1, 30))
    assert first == list(mutants(1, 60))[:30] != list(mutants(2, 30))
    assert len({mutant.description for mutant in first}) == 30
    changed = [mutant for mutant in first if mutant.files != WHOLE.files or mutant.overrides]
    assert len(changed) >= 28, "now and then a change changes nothing"


def test_what_mutants_are_made_of_is_a_right_run(tmp_path):
    assert judge(WHOLE, try_mutant(WHOLE, tmp_path, main)) == "accepted"


@pytest.mark.parametrize("seed", range(3))
def test_mutants_are_refused_clearly_or_are_right_runs(tmp_path, seed):
    for mutant in mutants(100 + seed, 8):
        result = try_mutant(mutant, tmp_path, main, seconds=60)
        assert judge(mutant, result) in GOOD, (mutant.description, result)


def result(err: str = "", status: int = 2, **changes) -> Result:
    return Result(**{"status": status, "hung": False, "seconds": 0.1, "out": "", "err": err} | changes)


@pytest.mark.parametrize(
    "ended, kind",
    [
        (result("moe-bsr train: train.lr = 0.0: above 0\n"), "refused"),
        (result("usage: moe-bsr train [-h]\nmoe-bsr train: error: lr\n"), "refused"),
        (result("moe-bsr train: loss nan: lower train.lr\n", 1), "stopped"),
        (result(status=0), "accepted"),
        (result("Traceback (most recent call last):\n  ...\nKeyError: 'lr'\n", 1), "traceback"),
        (result(status=70), "traceback"),
        (result(status=-11), "ended by signal 11"),
        (result(status=-9, hung=True), "hung"),
        (result("lr"), "refused"),
        (result("lr\nis wrong"), "2 lines"),
        (result(""), "0 lines"),
        (result("lr" * 400), "800 characters"),
        (result("lr \x1b[31m"), "control characters"),
        (result("something is wrong"), "names neither key nor file"),
        (result("lr", 3), "status 3"),
    ],
)
def test_a_case_is_judged_by_status_lines_length_and_words(ended, kind):
    assert judge(WHOLE._replace(words=("lr",)), ended) == kind
    assert (kind in GOOD) == (kind in ("refused", "stopped", "accepted"))


# --- the process ---


def hang() -> None:
    time.sleep(60)


def eat() -> None:
    bytearray(2**31)


@pytest.mark.parametrize(
    "act, status, words",
    [
        (lambda: 3, 3, ""),
        (lambda: None, 0, ""),
        (lambda: exit("said"), 1, ""),
        (lambda: 1 // 0, 70, "ZeroDivisionError"),
        (eat, 70, "MemoryError"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), -11, ""),
        (hang, -9, ""),
        (lambda: print("here:", os.getcwd()), 0, ""),
    ],
)
def test_a_process_ends_as_it_ends_and_this_one_goes_on(tmp_path, act, status, words):
    before = os.getcwd()
    ended = run(act, tmp_path, seconds=0.5 if act is hang else 20, megabytes=512)
    assert ended.status == status and words in ended.err and ended.hung == (act is hang)
    assert os.getcwd() == before
    if "here" in ended.out:
        assert str(tmp_path) in ended.out
