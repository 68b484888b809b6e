"""Test the command line of moe-bsr train and compare: what they print and their exit statuses."""

import os
import shutil
import signal

import pytest
from fresh import run as run_fresh
from PIL import Image
from tiny_runs import LATE, act_at, make_config

from moe_bsr import config as configuration
from moe_bsr.api import train
from moe_bsr.cli.main import main
from moe_bsr.runs import folder as run
from moe_bsr.runs import report

pytestmark = pytest.mark.usefixtures("bare")


@pytest.fixture
def written(tmp_path) -> str:
    (tmp_path / "tiny.yaml").write_text(configuration.dump(make_config(tmp_path)))
    return str(tmp_path / "tiny.yaml")


def test_a_dry_run_prints_every_block_and_writes_nothing(written, tmp_path, capsys):
    assert main(["train", written, "--dry-run", "--run", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "shapes: 10 classes, train 23, val 7, test 10" in printed
    rows = {line.split()[0]: line for line in printed.splitlines() if line.strip()[:1].isdigit()}
    assert "5 -> 4" in rows["1"] and "yes" in rows["1"]  # 4 patches: 2 kept, 1 fused, and the class token
    assert "top-2 of 4 experts x3" in rows["3"] and "dense" in rows["0"] and "(0)" in rows["0"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train.stepz=3"], "did you mean 'train.steps'"),
        (["train.lr=fast"], "train.lr = 'fast': expected number"),
        (["plan.train_blocks=[9]", "plan.moe_blocks=[]"], "outside the backbone's blocks 0 to 5"),
        (["plan.drop_blocks=[5]"], "block 5 is the last"),
        (["tasks=[nothing]", "data.root=nowhere"], "nothing"),
        (["moe.top_k=5"], "moe.top_k = 5: 1 to moe.num_experts = 4"),
    ],
)
def test_invalid_settings_are_refused_in_one_line_with_status_2(written, tmp_path, capsys, arguments, words):
    assert main(["train", written, *arguments, "--run", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("moe-bsr train: ") and len(error.splitlines()) == 1


def test_training_prints_the_report_and_compare_tabulates_runs(written, tmp_path, capsys):
    for name, change in (("moe", []), ("dense", ["plan.moe_blocks=[]"])):
        assert main(["train", written, "train.steps=2", *change, "--run", str(tmp_path / name)]) == 0
    assert "| shapes |" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "dense"), str(tmp_path / "moe"), "--experts"]) == 0
    header, chance, dense, moe, *use = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["top-1", "%", "shapes", "fractals"] and chance.split()[1] == "10.0"
    assert f"{report.read(tmp_path / 'moe')['tasks']['shapes']['top1']:.1f}" == moe.split()[1]
    assert dense.startswith("dense") and any("block 5" in line for line in use)
    assert main(["compare", str(tmp_path)]) == 2


def test_compare_shows_an_interrupted_run_with_dashes(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        act_at(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(make_config(tmp_path, **LATE), tmp_path / "run")["status"] == "interrupted"
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "run"), "--markdown"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("| run | - | - | - |")


def test_compare_names_runs_in_folders_of_equal_names_by_path(tmp_path, monkeypatch, capsys):
    train(make_config(tmp_path, **LATE, train__steps=2), tmp_path / "a" / "run")
    for copy in ("b/run", "c"):
        shutil.copytree(tmp_path / "a" / "run", tmp_path / copy)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["compare", "a/run/", "b/run", "c", "a/run"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["a/run", "b/run", "c"]


def test_a_damaged_report_is_refused_by_name(written, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["train", written, "train.steps=2", "--run", str(folder)]) == 0
    for content in ("", '{"status": "fini', "[]", "{}"):
        (folder / "report.json").write_text(content)
        capsys.readouterr()
        assert main(["compare", str(folder)]) == 2, content
        assert main(["train", written, "train.steps=2", "--run", str(folder), "--resume"]) == 2, content
        assert main(["evaluate", str(folder), "--split", "test"]) == 2, content
        refusals = capsys.readouterr().err.splitlines()
        assert len(refusals) == 3 and all(f"{folder / 'report.json'}: cut or damaged" in line for line in refusals)
        assert run.test_evaluations(folder) == 1
    (folder / "report.json").unlink()
    assert main(["train", written, "train.steps=2", "--run", str(folder), "--resume"]) == 0
    assert report.read(folder)["test_evaluations"] == 2


def test_evaluate_and_predict_use_the_trained_tasks_of_an_unfinished_series(tmp_path, capsys):
    config = make_config(tmp_path, **LATE, mode="single_task", train__steps=2)
    train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "fractals")
    capsys.readouterr()
    image = tmp_path / "image.png"
    Image.new("RGB", (20, 20)).save(image)
    for name, arguments in (("evaluate", []), ("predict", [str(image)])):
        call = [str(tmp_path / "run"), *arguments, "--device", "cpu", "--weights", "random"]
        assert main([name, *call, "--json", "--task", "shapes"]) == 0
        printed = capsys.readouterr().out
        assert '"shapes"' in printed and "fractals" not in printed
        for chosen in ([], ["--task", "fractals"]):
            assert main([name, *call, *chosen]) == 2
            refusal = capsys.readouterr().err
            assert "not trained yet: fractals;" in refusal and "--resume" in refusal and "--task shapes" in refusal


def test_divergence_exits_with_1(written, tmp_path, capsys):
    extreme = ["train.lr=1e30", "train.weight_decay=0", "train.grad_clip_norm=null"]
    assert main(["train", written, *extreme, "--run", str(tmp_path / "run")]) == 1
    assert "last good checkpoint" in capsys.readouterr().err


def test_training_works_without_optional_packages(written, tmp_path):
    code = f"""if True:
        import sys
        ours = [vars(module) for name, module in sys.modules.items() if name.startswith("moe_bsr")]
        held = {{str(getattr(each, "__module__", None) or getattr(each, "__name__", "")) for module in ours
                for each in module.values()}}
        assert "moe_bsr.api" in sys.modules and not [name for name in held if name.startswith(("matplotlib", "scipy"))]
        sys.modules |= dict.fromkeys(["matplotlib", "scipy"])
        from moe_bsr.cli.main import main
        sys.exit(main(["train", {written!r}, "train.steps=2", "--run", {str(tmp_path / "run")!r}]))
    """
    done = run_fresh(code)
    assert done.returncode == 0, done.stderr
