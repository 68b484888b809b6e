"""Test moe-bsr pretrain: the file it writes is a backbone for training."""

import json

from safetensors import safe_open

from moe_bsr.cli.main import main


def test_a_short_pretraining_writes_weights_with_metadata(tmp_path, capsys):
    out = tmp_path / "inner" / "small.safetensors"
    assert main(["pretrain", "--images", "4", "--pool", "4", "--batch", "4", "--out", str(out)]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    with safe_open(out, "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    assert json.loads(metadata["architecture"])["depth"] == 12 and json.loads(metadata["mean"]) == [0.5] * 3
    assert "4 seen" in metadata["source"] and "blocks.11.mlp.fc2.weight" in keys
    assert not any(key.startswith("head") for key in keys)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
