"""moe-bsr fit beside tests/fit: its arguments and what it stores."""

import json

import pytest

from moe_bsr import api, fit
from moe_bsr.cli.fit import configuration
from moe_bsr.cli.main import main
from moe_bsr.config import ConfigError


def test_a_size_without_its_unit_is_refused_by_the_option(capsys):
    assert main(["fit", "shapes", "--minutes", "1", "--memory", "900"]) == 2
    assert "--memory = '900': a size of at least 1,048,576 bytes such as 600MB" in capsys.readouterr().err


def test_the_test_accuracy_is_printed_and_stored(tmp_path, monkeypatch, capsys):
    searched = {"signal": 0, "run": str(tmp_path / "probe")}
    scores = {"mean_top1": 54.1, "tasks": {"shapes": {"top1": 54.1}}}
    monkeypatch.setattr(fit.Search, "run", lambda self: dict(searched))
    monkeypatch.setattr(api, "evaluate", lambda run, split: scores)
    assert main(["fit", "shapes", "--minutes", "1", "--run", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == searched | {"test": scores} == json.loads((tmp_path / "fit.json").read_text())


@pytest.mark.parametrize(
    "text, words",
    [
        ("source: folder\npath: here\ntest_fractoin: 0.2\n", ["task birds", "test_fractoin", "test_fraction"]),
        ("sorce: folder\npath: here\n", ["task birds", "'source' is missing"]),
        ("tasks: [shapes]\ntrian: {lr: 1}\n", ["trian", "train"]),
    ],
)
def test_a_typo_is_reported_for_what_the_file_is(tmp_path, text, words):
    (tmp_path / "birds.yaml").write_text(text)
    with pytest.raises(ConfigError) as refusal:
        configuration([str(tmp_path / "birds.yaml")])
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize("what, name", [(["shapes"], "shapes"), (["configs/quickstart.yaml"], "quickstart")])
def test_one_argument_is_a_task_or_a_configuration(what, name):
    config, called = configuration(what)
    assert called == name and (config.task_names() == ["shapes"]) == (name == "shapes")
