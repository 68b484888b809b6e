"""Test moe-bsr benchmark: step times as JSON, and tables printed from that JSON."""

import json

from moe_bsr.cli.main import main

TINY = ["--backbone", "deit_tiny_patch16_224", "--image-size", "64", "--batch", "2", "--threads", "1"]


def test_json_has_the_step_times_of_every_round_and_tables_are_printed_from_it(capsys, tmp_path):
    call = ["benchmark", *TINY, "--precisions", "fp32", "--rounds", "2", "--steps", "3", "--cases", "dense_ffn"]
    assert main([*call, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    case = result["groups"]["experts fp32"]["dense_ffn fp32"]
    assert [len(turn) for turn in case["seconds"]] == [3, 3]
    assert case["memory"]["kept_per_image"] > 0 and result["targets"] == []
    (tmp_path / "benchmark.json").write_text(json.dumps(result))
    assert main(["benchmark", "--from-json", str(tmp_path / "benchmark.json"), "--markdown"]) == 0
    titles, _, row = capsys.readouterr().out.splitlines()
    assert titles.startswith("| experts fp32 | step ms |") and row.startswith("| dense_ffn fp32 | ")


def test_what_cannot_be_measured_is_refused(capsys, tmp_path):
    assert main(["benchmark", "--from-json", str(tmp_path / "absent.json")]) == 2
    assert main(["benchmark", *TINY, "--cases", "nothing"]) == 2
    assert main(["benchmark", "--batch", "1"]) == 2
    assert "--batch = 1: at least 2" in capsys.readouterr().err
