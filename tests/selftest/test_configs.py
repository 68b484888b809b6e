"""The campaign of broken configurations: cases are drawn from a seed, run, and judged by how they end."""

import pytest
from fresh import in_fresh_process

from moe_bsr.selftest.configs import FILES, GOOD, Mutant, judge, mutants
from moe_bsr.selftest.sandbox import Outcome

WHOLE = Mutant("nothing", {name: text.encode() for name, text in FILES.items()}, [])


def test_the_same_seed_gives_the_same_mutants_in_campaigns_of_any_length():
    first = list(mutants(1, 30))
    assert first == list(mutants(1, 60))[:30] != list(mutants(2, 30))
    assert len({mutant.description for mutant in first}) == 30
    changed = [mutant for mutant in first if mutant.files != WHOLE.files or mutant.overrides]
    assert len(changed) >= 28, "now and then a change changes nothing"


def test_the_configuration_that_is_mutated_is_valid(tmp_path):
    whole = "configs.Mutant('nothing', {name: text.encode() for name, text in configs.FILES.items()}, [])"
    assert (
        in_fresh_process(tmp_path, f"configs.judge({whole}, configs.try_mutant({whole}, folder, main))") == "accepted"
    )


def test_mutants_are_refused_clearly_or_run(tmp_path):
    result = in_fresh_process(tmp_path, "configs.campaign(folder, 12, 100, main)")
    assert (result["tried"], result["failed"]) == (12, 0), result


def ended(err: str = "", status: int | None = 2) -> Outcome:
    return Outcome(status, "", err, 0.1, 0.0)


@pytest.mark.parametrize(
    "outcome, kind",
    [
        (ended("moe-bsr train: train.lr = 0.0: above 0\n"), "refused"),
        (ended("usage: moe-bsr train [-h]\nmoe-bsr train: error: lr\n"), "refused"),
        (ended("x.py:3: UserWarning: lr\n  warn(lr)\nmoe-bsr train: lr\n"), "refused"),
        (ended("moe-bsr train: loss nan: lower train.lr\n", 1), "stopped"),
        (ended(status=0), "accepted"),
        (ended("Traceback (most recent call last):\n  ...\nKeyError: 'lr'\n", 1), "traceback: KeyError: 'lr'"),
        (ended(status=-11), "ended by SIGSEGV"),
        (ended(status=None), "hung for 0 s"),
        (ended("lr\nis wrong"), "2 lines: lr / is wrong"),
        (ended(""), "refused without a word"),
        (ended("lr" * 400), "a line of 800 characters"),
        (ended("lr \x1b[31m"), "control letters: 'lr \\x1b[31m'"),
        (ended("something is wrong"), "names none of lr: something is wrong"),
        (ended("lr", 3), "status 3"),
    ],
)
def test_a_case_is_judged_by_its_exit_status_and_message(outcome, kind):
    assert judge(WHOLE._replace(words=("lr",)), outcome) == kind
    assert (kind in GOOD) == (kind in ("refused", "stopped", "accepted"))
