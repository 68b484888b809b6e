"""Test the index of results: it is generated from the result files and up to date."""

import json
from pathlib import Path

import pytest

from moe_bsr.runs.results import readme, write_readme

RESULTS = Path(__file__).resolve().parents[2] / "results"
RUN = {
    "status": "finished",
    "split": "test",
    "tasks": {"a": {"images": 1280}, "b": {"images": 2560}},
    "mean_top1": 61.25,
    "train_seconds": 1234.0,
    "measured_peak_mb": 987.0,
    "gflops_per_image": 1.5,
}
ENVIRONMENT = {"processor": "some CPU", "threads": 2, "precision": "fp32", "torch": "9.9"}


def put(folder: Path, name: str, result) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(result if isinstance(result, str) else json.dumps(result))


@pytest.mark.skipif(not RESULTS.is_dir(), reason="installed without its results")
def test_the_readme_of_the_results_is_up_to_date():
    assert (RESULTS / "README.md").read_text() == readme(RESULTS), "write it anew: moe-bsr results"


def test_a_run_has_a_row_with_figures_environment_commit_and_command(tmp_path):
    about = {"environment": ENVIRONMENT, "commit": "0123456789abcdef-dirty", "command": "moe-bsr train x.yaml"}
    put(tmp_path, "mine/report.json", RUN | about)
    put(tmp_path, "cut/report.json", RUN | {"status": "interrupted", "mean_top1": None})
    assert write_readme(tmp_path) == tmp_path / "README.md"
    old, new = (tmp_path / "README.md").read_text().splitlines()[-2:]
    assert new == (
        "| [mine](mine/report.json) | mean top-1 61.2 % (test) of 2 tasks; 1,280-2,560 images a task, 1,234 s; peak "
        "987 MB; 1.50 GFLOPs an image | some CPU, 2 threads, fp32, torch 9.9 | `0123456789-dirty` | "
        "`moe-bsr train x.yaml` |"
    )
    assert "interrupted of 2 tasks" in old and old.endswith("| - | - | - |")
    put(tmp_path, "mine/report.json", RUN | {"gflops_per_image": None})  # as if the cost could not be predicted
    assert "peak 987 MB | - |" in readme(tmp_path)


def test_the_kind_of_a_result_is_detected_from_its_keys(tmp_path):
    asked = {"arguments": {"backbone": "vit", "batch": 8}, **ENVIRONMENT}
    target = {"what": "faster", "value": 2.5, "reached": True}
    put(tmp_path, "a.json", asked | {"groups": {"g": {"one": 1, "two": 2}}, "targets": [target]})
    put(tmp_path, "b.json", asked | {"scaling": {"batch": [1, 2, 3]}})
    kept = {"kept": {"worst": 0.015, "median": 0.0}}
    put(tmp_path, "c.json", {"summary": kept, "records": [1, 2], "within_tolerance": False, "command": ["x", "y"]})
    top1 = {"exact": {"t": [50.0, 52.0]}, "int8": {"t": [51.0, 52.0]}}
    put(tmp_path, "d.json", {"config": "c.yaml", "steps": 5, "seeds": [0, 1], "top1": top1})
    export = {"bundle": "out", "bytes": 15_600_000, "precision": "float32"}
    parity = {"difference": 2e-5, "tolerance": 1e-4}
    put(tmp_path, "e.json", export | {"tasks": {"a": {"top1": 50.0, "parity": parity}}})
    candidates = [{"name": "probe", "val_top1": 70.0}, {"name": "late", "val_top1": 72.25}]
    fitted = {
        "candidates": candidates,
        "best": "late",
        "minutes": 2.0,
        "memory_bytes": 2**30,
        "test": {"mean_top1": 71.0},
    }
    put(tmp_path, "f.json", fitted)
    attack = {"failed": 1, "torch": "9.9", "commit": "0123", "damage": {"tried": 1500, "failed": 1}}
    put(tmp_path, "g.json", attack)
    race = [{"method": name, "minutes": 2.0, "mean_top1": mean} for name, mean in (("fit", 60.0), ("probe", 58.25))]
    put(tmp_path, "h.json", {"runs": [*race, race[0] | {"mean_top1": 61.0}], "environment": ENVIRONMENT})
    text = readme(tmp_path)
    for words in (
        "1 tasks, 15.6 MB, float32: mean validation top-1 50.0 %; float32 logits within 0.20 of the tolerance",
        "vit, batch 8: 2 cases, 1 of 1 targets reached; faster: 2.50 | some CPU",
        "batch (3 points)",
        "2 cases, not within tolerance; predicted against measured, at worst: kept 1.5 % | - | - | `x`<br>`y`",
        "2 minutes, 1,024 MB: late; test 71.0 % (validation top-1 %: probe 70.0, late 72.2)",
        "2 minutes, test top-1 %: fit 60.5, probe 58.2",
        "damage: 1,500 tried, 1 failed",
        "c.yaml, 5 updates, 1 tasks, 2 seeds: top-1 51.0 % exact, int8 +0.50 points",
    ):
        assert words in text
    assert text.count("## ") == 8


@pytest.mark.parametrize(
    ("content", "words"),
    [('{"a": 1', "cut or damaged"), ("[]", "not an object"), ('{"odd": 1}', "no known kind, it has odd")],
)
def test_an_invalid_result_file_is_refused_by_name(tmp_path, content, words):
    put(tmp_path, "x.json", content)
    with pytest.raises(ValueError, match=rf"x\.json: .*{words}"):
        readme(tmp_path)
