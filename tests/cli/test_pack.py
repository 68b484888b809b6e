"""Test moe-bsr pack: a pack replaces its originals exactly, and the command never puts the originals at risk."""

import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_data import torchvision_task

from moe_bsr.cli.main import main
from moe_bsr.data import load_spec, load_task


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 20, 3), dtype=np.uint8))


def write_images(folder, train: int = 1, test: int = 1) -> None:
    for split, count in (("train", train), ("test", test)):
        for k, name in enumerate(["ant", "bee"]):
            (folder / split / name).mkdir(parents=True)
            for n in range(count):
                picture(100 * k + n).save(folder / split / name / f"{n}.png")


def write_task(tmp_path, name: str, path: str) -> str:
    (tmp_path / f"{name}.yaml").write_text(f"title: Insects\nsource: folder\npath: {path}\n")
    return str(tmp_path / f"{name}.yaml")


def test_a_pack_replaces_its_folder_task(tmp_path, capsys):
    write_images(tmp_path / "bugs", 12, 3)
    file = write_task(tmp_path, "insects", "bugs")
    before = load_task(load_spec(file), root=tmp_path)
    assert main(["pack", file, "--root", str(tmp_path)]) == 0
    assert "24 images" in capsys.readouterr().out
    after = load_task(load_spec(file), root=tmp_path)
    assert "folder" in before.origin and "pack" in after.origin
    assert after.class_names == before.class_names
    for split in ("train", "val", "test"):
        old, new = getattr(before, split), getattr(after, split)
        np.testing.assert_array_equal(old.index, new.index)
        np.testing.assert_array_equal(old.labels, new.labels)
        for i in old.index:
            np.testing.assert_array_equal(old.source.image(i), new.source.image(i))
    assert main(["pack", file, "--root", str(tmp_path)]) == 2
    assert "insects is a pack already; remove it" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["bugs", "bugs/photos", "elsewhere"])
def test_error_messages_never_advise_removing_the_originals(tmp_path, capsys, path):
    write_images(tmp_path / path)
    (tmp_path / "bugs").mkdir(exist_ok=True)
    call = ["pack", write_task(tmp_path, "bugs", path), "--root", str(tmp_path)]
    assert main(call) == 2
    refusal = capsys.readouterr().err
    assert "name another --out" in refusal and "remove" not in refusal
    assert ("the folder of the originals" in refusal) == (path != "elsewhere")
    assert main([*call, "--out", str(tmp_path / "packs")]) == 0
    assert (tmp_path / "packs" / "bugs" / "train.npz").is_file()
    assert (tmp_path / path / "train" / "ant" / "0.png").is_file()


def test_all_damaged_images_are_named_at_once_and_no_pack_is_left(tmp_path, capsys):
    write_images(tmp_path / "bugs", 3, 2)
    broken = ["train/ant/0.png", "train/bee/2.png", "test/ant/1.png"]
    for name in broken:
        (tmp_path / "bugs" / name).write_bytes(b"broken")
    assert main(["pack", write_task(tmp_path, "insects", "bugs"), "--root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in broken) and "3 images cannot be read" in error and "remove" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bugs", "insects.yaml"]


@pytest.mark.parametrize("splits", [("val", "test"), ("val",), ()])
def test_a_pack_has_the_splits_of_its_source(tmp_path, splits):
    write_images(tmp_path / "bugs", 12, 3)
    for name in ("val", "test"):
        if name == "val" and name in splits:
            shutil.copytree(tmp_path / "bugs" / "test", tmp_path / "bugs" / name)
    if "test" not in splits:
        shutil.rmtree(tmp_path / "bugs" / "test")
    file = write_task(tmp_path, "insects", "bugs")
    before = load_task(load_spec(file), root=tmp_path)
    assert main(["pack", file, "--root", str(tmp_path)]) == 0
    after = load_task(load_spec(file), root=tmp_path)
    assert "pack" in after.origin
    for split in ("train", "val", "test"):
        old, new = getattr(before, split), getattr(after, split)
        assert [old.source.names[i] for i in old.index] == [new.source.names[i] for i in new.index]
    if splits:
        (tmp_path / "insects" / f"{splits[-1]}.npz").unlink()
        with pytest.raises(FileNotFoundError, match=f"{splits[-1]}.npz"):
            load_task(load_spec(file), root=tmp_path)


def test_a_pack_preserves_bit_depth_and_transparency(tmp_path):
    write_images(tmp_path / "bugs", 4, 2)
    for n, values in enumerate((np.arange(64, dtype=np.uint16) * 64, np.full(64, 4095, np.uint16))):
        Image.fromarray(values.reshape(8, 8)).save(tmp_path / "bugs" / "train" / "ant" / f"{n}.png")
    Image.new("LA", (9, 9), (0, 0)).save(tmp_path / "bugs" / "train" / "bee" / "0.png")
    file = write_task(tmp_path, "insects", "bugs\nbits: 12")
    before = load_task(load_spec(file), root=tmp_path).train.source
    assert main(["pack", file, "--root", str(tmp_path), "--short-side", "8"]) == 0
    after = load_task(load_spec(file), root=tmp_path).train.source
    for name in ("ant/0.png", "ant/1.png", "bee/0.png"):
        old, new = (source.image(source.names.index(name)) for source in (before, after))
        assert np.abs(old[:8, :8].astype(int) - new[:8, :8]).max() <= 2 and new.max() >= 245


def test_a_pack_of_a_torchvision_task_is_not_overwritten(tmp_path, capsys):
    file = torchvision_task(tmp_path)
    assert main(["pack", str(file), "--root", str(tmp_path), "--out", str(tmp_path / "packs")]) == 0
    assert main(["pack", str(file), "--root", str(tmp_path), "--out", str(tmp_path / "packs")]) == 2
    assert "is a pack already" in capsys.readouterr().err
