"""moe-bsr fit beside tests/fit: its arguments and what it stores."""

import json

from moe_bsr import api, fit
from moe_bsr.cli.main import main


def test_a_size_without_its_unit_is_refused_by_the_option(capsys):
    assert main(["fit", "shapes", "--minutes", "1", "--memory", "900"]) == 2
    assert "--memory = '900': a size of at least 1,048,576 bytes such as 600MB" in capsys.readouterr().err


def test_the_test_accuracy_is_printed_and_stored(tmp_path, monkeypatch, capsys):
    climbed = {"signal": 0, "run": str(tmp_path / "probe")}
    scores = {"mean_top1": 54.1, "tasks": {"shapes": {"top1": 54.1}}}
    monkeypatch.setattr(fit.Ladder, "climb", lambda self: dict(climbed))
    monkeypatch.setattr(api, "evaluate", lambda run, split: scores)
    assert main(["fit", "shapes", "--minutes", "1", "--run", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == climbed | {"test": scores} == json.loads((tmp_path / "fit.json").read_text())
