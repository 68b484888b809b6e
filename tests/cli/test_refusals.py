"""Test that invalid settings and weights end the command with status 2 and one line, also in the dry run."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_runs import make_config

from moe_bsr.cli.main import main
from moe_bsr.config import dump


@pytest.fixture
def refuse(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(dump(make_config(tmp_path)))

    def run(*overrides: str) -> str:
        assert main(["train", str(file), *overrides, "--run", str(tmp_path / "run"), "--dry-run"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert len(line) <= 700 and not (tmp_path / "run").exists()
        return line

    return run


@pytest.mark.parametrize("written", [["--train.steps", "100"], ["--train.steps=100"], ["--moe.top_k=2"]])
def test_a_key_written_as_a_flag_is_refused_with_the_right_form(written, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "quickstart.yaml", *written, "--dry-run"])
    assert ended.value.code == 2
    key = written[0].strip("-").partition("=")[0]
    assert f"without dashes: {key}=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["nan", "int8", "pointer", "short"])
def test_invalid_weight_files_are_refused_before_training(tmp_path, refuse, case):
    state = timm.create_model("test_vit", num_classes=0, img_size=32).state_dict()
    name = "blocks.5.mlp.fc1.weight"
    file = tmp_path / "w.safetensors"
    if case == "nan":
        state[name][0, 0] = float("nan")
    elif case == "int8":
        state[name] = state[name].to(torch.int8)
    save_file(state, file)
    if case == "pointer":
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    elif case == "short":
        file.write_bytes(file.read_bytes()[:1000])
    line = refuse(f"backbone.weights={file}")
    words = {"nan": f"not finite: {name}", "int8": f"{name} is int8", "pointer": "Git LFS", "short": "cut off"}
    assert "backbone.weights = " in line and words[case] in line


@pytest.mark.parametrize(
    "override, words",
    [
        ("backbone.image_size=100000", "backbone.image_size = 100000: at least 1, at most 4,096"),
        ("backbone.image_size=33", "backbone.image_size = 33: a multiple of the patch size"),
        ("backbone.name=seresnet50", "backbone.name = 'seresnet50': has SEModule"),
        ("backbone.name=../../x", "backbone.name = '../../x'"),
        ("moe.num_experts=1000000", "moe.num_experts = 1000000: at least 1, at most 1,024"),
        ("adapter={kind: lora, alpha: 0}", "adapter.alpha = 0.0: above 0"),
        ("adapter={kind: lora, rank: 1000000000}", "adapter.rank = 1000000000"),
        ("storage={kind: int8, bits: 4}", "unknown key storage.bits"),
        ("storage={kind: [a]}", "storage = ['a']: one of exact"),
        ("sampler.kind=rond_robin", "did you mean 'round_robin'"),
    ],
)
def test_an_invalid_setting_is_refused_with_its_key(refuse, override, words):
    assert words in refuse(override)
