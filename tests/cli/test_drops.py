"""Test moe-bsr drops: the table, the JSON and error messages."""

import json

import pytest
from tiny_runs import make_config

from moe_bsr import config as configuration
from moe_bsr.benchmark import drops
from moe_bsr.cli.main import main

pytestmark = pytest.mark.usefixtures("light")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(configuration.dump(make_config(tmp_path)))
    return str(path)


def test_the_table_and_the_json_agree(file, capsys, monkeypatch):
    study, rows = drops.study, []
    monkeypatch.setattr(drops, "study", lambda *given: rows.extend(study(*given)) or rows)
    command = ["drops", file, "--images", "30", "--at", "1,3:0.75", "2:0.5"]
    assert main(command) == 0
    text = capsys.readouterr().out
    monkeypatch.setattr(drops, "study", lambda *given: rows)
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    names = ["none", "keep 0.5 at 1,3", "keep 0.75 at 1,3", "keep 0.5 at 2"]
    assert [each["setting"] for each in result["settings"]] == names and result["own"] == names[1]
    for each in result["settings"]:
        assert f"{each['relative_flops']:.1%}" in text and each["setting"] in text
        assert each["val_top1"].keys() == {"shapes", "fractals"}
    assert result["best"] in text.splitlines()[-1]


@pytest.mark.parametrize("at", ["5:0.5", "1:2", "1,1:0.5", "1,2:0.5,0.5,0.5", "x", "1:0"])
def test_invalid_drop_settings_are_refused(file, at, capsys):
    try:
        status = main(["drops", file, "--at", at])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert len(capsys.readouterr().err.strip().splitlines()[-1]) < 300
