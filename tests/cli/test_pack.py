"""moe-bsr pack: a pack takes the place of its originals, and never endangers them."""

import numpy as np
import pytest
from PIL import Image

from moe_bsr.cli.main import main
from moe_bsr.data import load_spec, load_task


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 20, 3), dtype=np.uint8))


def write_images(place, train: int = 1, test: int = 1) -> None:
    for split, count in (("train", train), ("test", test)):
        for k, name in enumerate(["ant", "bee"]):
            (place / split / name).mkdir(parents=True)
            for n in range(count):
                picture(100 * k + n).save(place / split / name / f"{n}.png")


def write_task(tmp_path, name: str, path: str) -> str:
    (tmp_path / f"{name}.yaml").write_text(f"title: Insects\nsource: folder\npath: {path}\n")
    return str(tmp_path / f"{name}.yaml")


def test_a_folder_task_is_packed_and_the_pack_takes_its_place(tmp_path, capsys):
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
def test_it_never_advises_to_remove_originals(tmp_path, capsys, path):
    write_images(tmp_path / path)
    (tmp_path / "bugs").mkdir(exist_ok=True)
    call = ["pack", write_task(tmp_path, "bugs", path), "--root", str(tmp_path)]
    assert main(call) == 2
    refusal = capsys.readouterr().err
    assert "name another --out" in refusal and "remove" not in refusal
    assert ("where the originals lie" in refusal) == (path != "elsewhere")
    assert main([*call, "--out", str(tmp_path / "packs")]) == 0
    assert (tmp_path / "packs" / "bugs" / "train.npz").is_file()
    assert (tmp_path / path / "train" / "ant" / "0.png").is_file()


def test_a_damaged_image_is_named_and_no_pack_left(tmp_path, capsys):
    write_images(tmp_path / "bugs")
    (tmp_path / "bugs" / "train" / "ant" / "0.png").write_bytes(b"broken")
    assert main(["pack", write_task(tmp_path, "insects", "bugs"), "--root", str(tmp_path)]) == 2
    assert "ant/0.png" in capsys.readouterr().err
    assert sorted(place.name for place in tmp_path.iterdir()) == ["bugs", "insects.yaml"]
