"""Test shared runs: they compute the same as the run, contain nothing about the machine and are read safely."""

import json
import re
import shutil
import stat
import struct
import zipfile
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_data import picture
from tiny_runs import make_config

import moe_bsr
from moe_bsr import config as configuration
from moe_bsr.cli.compare_methods import portable
from moe_bsr.config import BackboneConfig, ConfigError, replace
from moe_bsr.model.backbones.pretrained import in_timm
from moe_bsr.model.backbones.vit import load
from moe_bsr.runs import archive, shared_form
from moe_bsr.runs.checkpoint import CheckpointError
from moe_bsr.runs.config_file import read_config
from moe_bsr.runs.share import share
from moe_bsr.runs.timm_folder import beyond_timm, write_timm
from moe_bsr.runs.warm_start import build_from
from moe_bsr.training.added_task import added_task_config

pytestmark = pytest.mark.usefixtures("bare")

PLAIN = {"plan__moe_blocks": [], "plan__drop_blocks": []}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Train a run with experts, a moving average and a backbone from a file that only this machine has."""
    folder = tmp_path_factory.mktemp("private_place")
    file = folder / "secret_backbone.safetensors"
    vit = timm.create_model("test_vit", num_classes=0, img_size=32)
    save_file(vit.state_dict(), file)
    config = make_config(folder, train__steps=2, train__ema_decay=0.5, backbone__weights=str(file))
    moe_bsr.train(config, folder / "run", callbacks=[])
    return folder / "run"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    moe_bsr.train(make_config(folder, train__steps=2, **PLAIN), folder / "run", callbacks=[])
    return folder / "run"


def logits(run: Path, **options) -> dict[str, torch.Tensor]:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return {task: model(images, task).logits for task, model in moe_bsr.load(run, **options).models.items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[task], second[task]) for task in first)


def backbone_file(run: Path) -> Path:
    return run.parent / "secret_backbone.safetensors"


@pytest.fixture(scope="module")
def shared(trained, tmp_path_factory) -> Path:
    """Return a folder with the shared run as a folder and as a zip file: given, given.zip."""
    folder = tmp_path_factory.mktemp("given")
    for name in ("given", "given.zip"):
        share(trained, folder / name)
    return folder


@pytest.mark.parametrize("name", ["given", "given.zip"])
def test_a_shared_run_computes_the_same_as_the_run(trained, shared, name):
    loaded = [moe_bsr.load(run, weights=str(backbone_file(trained))) for run in (trained, shared / name)]
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for task in loaded[0].models:
            assert torch.equal(*(run.models[task](images, task).logits for run in loaded))
    image = torch.zeros(20, 30, 3, dtype=torch.uint8).numpy()
    found = [run.predict(image) for run in loaded]
    assert found[0]["images"] == found[1]["images"] and found[1]["run"] == str(shared / name)


def test_a_shared_run_does_not_contain_frozen_weights(trained, shared):
    backbone = sum(tensor.nbytes for tensor in load_file(backbone_file(trained)).values())
    every = sum(p.numel() * 4 for p in moe_bsr.load(trained).models["shapes"].parameters())
    assert (shared / "given/model.safetensors").stat().st_size < every - backbone / 4


def test_a_run_shared_with_its_backbone_needs_no_other_file(trained, tmp_path):
    elsewhere = shutil.copytree(trained.parent, tmp_path / "place")
    share(elsewhere / "run", tmp_path / "given.zip", with_backbone=True, weights=str(backbone_file(elsewhere / "run")))
    expected = logits(trained)
    shutil.rmtree(elsewhere)
    assert same(expected, logits(tmp_path / "given.zip"))
    config = replace(added_task_config(tmp_path / "given.zip", "pets"), runtime__precision="fp32")
    classes = moe_bsr.load(tmp_path / "given.zip").class_names | {"pets": ["cat", "dog"]}
    model, _ = build_from(str(tmp_path / "given.zip"), config, classes)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert all(torch.equal(model.eval()(images, task).logits, expected[task]) for task in expected)
    assert config.train.save == "all" and config.backbone.weights == "random"


def test_a_missing_or_wrong_backbone_file_is_named(trained, shared, tmp_path):
    with pytest.raises(ConfigError, match=r"given.zip: .*secret_backbone.safetensors.*weights=FILE says where"):
        moe_bsr.load(shared / "given.zip")
    other = tmp_path / "other.safetensors"
    save_file({n: v + 1 for n, v in load_file(backbone_file(trained)).items()}, other)
    with pytest.raises(
        CheckpointError,
        match="given.zip holds only the weights that training changed, and needs the backbone with sha256",
    ):
        moe_bsr.load(shared / "given.zip", weights=str(other))


def test_a_shared_run_contains_no_private_paths_or_commands(trained, shared):
    for file in (shared / "given").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o644, file
        content = file.read_bytes()
        for private in ("private_place", str(shared.parent), "pytest", "python "):
            assert private.encode() not in content, (file, private)
    assert {file.name for file in (shared / "given").iterdir()} == set(shared_form.FILES)
    tree = json.loads((shared / "given/config.json").read_text())
    assert tree["architecture"] == "test_vit" and tree["run"]["data"]["root"] == "data"


def shared_of(run: Path, place: Path, specs: dict[str, dict], changes: dict[str, dict] | None = None) -> dict:
    """Share a copy of a run whose config.yaml has other task specifications and sections, and return config.json."""
    shutil.copytree(run, place)
    tree = yaml.safe_load((place / "config.yaml").read_text())
    for task, spec in specs.items():
        tree["resolved"]["tasks"][task]["spec"] = spec
    for key, value in (changes or {}).items():
        tree[key] = tree[key] | value if key == "data" else value
    (place / "config.yaml").write_text(yaml.safe_dump(tree))
    share(place, place.parent / "given")
    return json.loads((place.parent / "given/config.json").read_text())["run"]


@pytest.mark.parametrize("listed", [False, True])
def test_no_folder_of_this_machine_is_shared(plain, tmp_path, listed):
    home = "/home/alice"
    tar = {
        "source": "tar",
        "train": [f"{home}/p/a.tar", "~/b.tar", f"{home}/q/a.tar", "below/c.tar"],
        "val": f"{{{home}/c,{home}/d}}.tar",
        "test": [f"file://{home}/e.tar", "https://host/f.tar"],
        "class_names": ["/m/01", "/m/02"],
        "cache": f"{home}/cache",
    }
    storage = {"kind": "offload", "folder": f"{home}/scratch"}
    data = {"augment": False, "feature_cache_mb": 1, "feature_cache_dir": f"{home}/features"}
    changes = {"storage": [storage | {"blocks": [1]}] if listed else storage, "data": data}
    tree = shared_of(plain, tmp_path / "run", {"shapes": tar}, changes)
    for file in (tmp_path / "given").iterdir():
        content = file.read_bytes()
        for place in (home, "alice", "~/b.tar", str(tmp_path), str(plain.parent)):
            assert place.encode() not in content, (file, place)
    spec = tree["resolved"]["tasks"]["shapes"]["spec"]
    assert spec["train"] == ["a.tar", "b.tar", "shapes/a.tar", "below/c.tar"], "each has its own name"
    assert spec["test"] == ["e.tar", "https://host/f.tar"] and spec["class_names"] == tar["class_names"]
    assert tree["storage"] == ([{"kind": "offload", "blocks": [1]}] if listed else {"kind": "offload"})
    base = configuration.to_dict(make_config(tmp_path, storage=changes["storage"]))
    assert portable(base)["storage"] == tree["storage"], "the file of compare-methods"


def test_files_of_two_tasks_keep_different_names(plain, tmp_path):
    tables = {
        "shapes": {"source": "csv", "path": "/x/p/labels.csv", "images": "/x/images"},
        "fractals": {"source": "csv", "path": "/x/q/labels.csv", "images": "/x/images"},
    }
    tree = shared_of(plain, tmp_path / "run", tables)
    specs = {task: about["spec"] for task, about in tree["resolved"]["tasks"].items()}
    assert [spec["path"] for spec in specs.values()] == ["labels.csv", "fractals/labels.csv"]
    assert [spec["images"] for spec in specs.values()] == ["images", "images"]


def test_the_model_card_has_valid_metadata(trained, shared):
    text = (shared / "given/README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "moe_bsr" and "license" not in head, "nobody knows the license of a file"
    score = json.loads((trained / "report.json").read_text())["tasks"]["fractals"]
    assert f"| fractals | 12 | {score['top1']:.1f} |" in text and "weights=" in text
    assert json.loads((shared / "given/config.json").read_text())["run"]["resolved"]["backbone_sha256"] in text


def test_the_model_card_shows_only_commands_that_work(shared):
    folder = (shared / "given/README.md").read_text()
    zipped = members_of(shared / "given.zip")["README.md"].decode()
    assert 'moe_bsr.evaluate("given", "test"' in folder and "moe_bsr.evaluate" not in zipped
    for text in (folder, zipped):
        assert "from a clone of its repository: `pip install .`" in text and "pip install moe_bsr" not in text


def test_a_shared_run_is_accepted_in_place_of_a_run_folder(trained, shared):
    weights = {"weights": str(backbone_file(trained))}
    found = moe_bsr.evaluate(shared / "given", "test", **weights)
    assert found["mean_top1"] == json.loads((trained / "report.json").read_text())["mean_top1"]
    assert found["test_evaluations"] == 1
    with pytest.raises(ConfigError, match="counted in a folder; unpack it first: python -m zipfile -e"):
        moe_bsr.evaluate(shared / "given.zip", "test", **weights)
    with pytest.raises(ConfigError, match="rejection.safetensors is written into the folder of the run; unpack it"):
        moe_bsr.reject(shared / "given.zip", on_task=pytest.fail, **weights)
    with pytest.raises(CheckpointError, match="no checkpoint 7 in .*given.zip: this shared run has only step 2"):
        moe_bsr.load(shared / "given.zip", 7, **weights)
    with pytest.raises(ConfigError, match="cannot be trained further"):
        moe_bsr.config.load(shared / "given")
    classes = {task: about["classes"] for task, about in read_config(trained)[1]["tasks"].items()}
    config = make_config(trained.parent, backbone__weights=str(backbone_file(trained)))
    model, notes = build_from(str(shared / "given.zip"), config, classes)
    assert notes[0] == f"weights from {shared / 'given.zip'}, step 2"
    with torch.inference_mode():
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        assert torch.equal(model.eval()(images, "shapes").logits, logits(trained)["shapes"])


def test_existing_files_are_not_replaced(trained, shared):
    for name in ("given", "given.zip"):
        with pytest.raises(ConfigError, match=f"{name} exists already"):
            share(trained, shared / name)
    assert sorted(path.name for path in shared.iterdir()) == ["given", "given.zip"], "nothing half-written is left"


# --- untrusted files ---


@pytest.fixture(scope="module")
def given(plain, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("given") / "given.zip"
    share(plain, file)
    return file


def members_of(given: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(given) as archived:
        return {name.removeprefix("given/"): archived.read(name) for name in archived.namelist()}


def zipped(file: Path, members: dict, **options) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, **options) as out:
        for name, content in members.items():
            out.writestr(name, content)
    return file


def damaged(members: dict[str, bytes], **changes) -> dict:
    return members | {name.replace("_", "."): content for name, content in changes.items()}


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


HOSTILE = {
    "weights of another run": (lambda m: damaged(m, model_safetensors=m["model.safetensors"][::-1]), "match its hash"),
    "no weights": (lambda m: {n: c for n, c in m.items() if n != "model.safetensors"}, "missing or unreadable"),
    "no config": (lambda m: {n: c for n, c in m.items() if n != "config.json"}, "it has no config.json"),
    "config that is none": (lambda m: damaged(m, config_json=b"[" * 100_000), "cut or damaged"),
    "another library": (lambda m: damaged(m, config_json=b'{"library_name": "timm"}'), "does not belong to a run"),
    "another format": (
        lambda m: damaged(m, config_json=m["config.json"].replace(b'"format": 1', b'"format": 2')),
        "use a newer moe_bsr",
    ),
    "a link": (
        lambda m: {n: c for n, c in m.items() if n != "config.json"} | {link("config.json"): b"/etc/passwd"},
        "config.json is no ordinary file",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_an_invalid_zip_file_is_refused(given, tmp_path, case):
    change, message = HOSTILE[case]
    with pytest.raises((ConfigError, CheckpointError), match=message) as refused:
        moe_bsr.load(zipped(tmp_path / "x.zip", change(members_of(given))))
    assert "x.zip" in str(refused.value) and "/moe_bsr_" not in str(refused.value)


def test_member_paths_cannot_escape_and_other_members_are_not_unpacked(given, tmp_path):
    members = members_of(given)
    hostile = {"../../escaped": b"x", "/tmp/moe_bsr_escaped": b"x", "a/b/config.json": b"{}", "run.py": b"raise"}
    file = zipped(tmp_path / "x.zip", members | hostile)
    with archive.opened(file) as folder:
        assert {path.name for path in folder.iterdir()} == set(shared_form.FILES)
        assert not (folder / "../../escaped").resolve().exists()
    assert not folder.exists() and not Path("/tmp/moe_bsr_escaped").exists()
    assert same(logits(file), logits(given))


def test_a_zip_bomb_is_not_unpacked(given, tmp_path):
    members = members_of(given)
    for name in ("config.json", "model.safetensors"):
        file = tmp_path / f"{name}.zip"
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
            for other, content in members.items():
                if other != name:
                    out.writestr(other, content)
            with out.open(name, "w") as member:
                for _ in range(80):
                    member.write(bytes(2**20))
        with pytest.raises(ConfigError, match=f"its {name} would take 83886080 bytes, unpacked from"):
            moe_bsr.load(file)


def test_a_member_larger_than_declared_is_not_unpacked(given, tmp_path):
    file = tmp_path / "x.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in members_of(given).items():
            out.writestr(name, bytes(2**22) if name == "README.md" else content)
    content = file.read_bytes().replace(struct.pack("<I", 2**22), struct.pack("<I", 100))
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="x.zip"):
        moe_bsr.load(file)


def test_a_path_that_is_neither_a_folder_nor_a_zip_file_is_refused(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"hello")
    with pytest.raises(ConfigError, match="x.zip is neither a run folder nor a zip file of one"):
        moe_bsr.load(tmp_path / "x.zip")


def test_a_link_in_a_shared_folder_is_not_followed(given, tmp_path):
    with archive.opened(given) as folder:
        shutil.copytree(folder, tmp_path / "x")
    (tmp_path / "x/model.safetensors").rename(tmp_path / "weights")
    (tmp_path / "x/model.safetensors").symlink_to(tmp_path / "weights")
    with pytest.raises(ConfigError, match="model.safetensors is a symbolic link"):
        moe_bsr.load(tmp_path / "x")


# --- timm ---


def test_timm_computes_the_same(plain, tmp_path):
    task = "fractals"
    notes = write_timm(plain, tmp_path / "folder", task)
    model = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        # Our last block computes only the class token, so its sums have another shape.
        torch.testing.assert_close(model(images), logits(plain)[task], rtol=1e-5, atol=1e-5)
    loaded, cfg = moe_bsr.load(plain), timm.data.resolve_model_data_config(model)
    assert notes["difference"] < 1e-5 and tuple(cfg["mean"]) == tuple(loaded.transforms.mean)
    assert cfg["input_size"] == (3, 32, 32) and cfg["crop_pct"] == loaded.transforms.crop_pct
    assert json.loads((tmp_path / "folder/config.json").read_text())["label_names"] == loaded.class_names[task]
    assert stat.S_IMODE((tmp_path / "folder/model.safetensors").stat().st_mode) == 0o644
    assert "library_name: timm" in (tmp_path / "folder/README.md").read_text()


@pytest.mark.parametrize("resize", ["timm", "squash"])
def test_timm_gives_nearly_the_same_pixels(plain, tmp_path, resize):
    shared_of(plain, tmp_path / "run", {}, {"data": {"resize": resize}})
    write_timm(tmp_path / "run", tmp_path / "folder", "shapes")
    cfg = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path / 'folder'}"))
    run = moe_bsr.load(tmp_path / "run")
    for size in ((90, 70), (70, 90), (80, 80)):
        image = picture(1, size)
        theirs = timm.data.create_transform(**cfg)(image)
        apart = 255 * (theirs - run.transforms.normalize(run.transforms.eval_image(image)[None])[0]).abs()
        assert apart.mean() < 2, "Pillow and torch round differently"
    text, crop = (tmp_path / "folder/README.md").read_text(), run.transforms.crop_pct
    assert ("squashed to the square, without a crop" in text) == (resize == "squash")
    assert ("Square images of up to 64 px" in text) == (resize == "timm" and crop < 1)


def test_the_bundled_backbone_equals_a_timm_model(tmp_path):
    config = BackboneConfig(image_size=32)
    name, arguments = in_timm(config)
    ours, theirs = load(config), timm.create_model(name, num_classes=0, **arguments)
    assert theirs.load_state_dict(ours.state_dict()) and type(theirs) is type(ours)
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(ours.eval()(images), theirs.eval()(images))


def test_runs_that_timm_cannot_represent_are_refused(trained, plain, tmp_path):
    with pytest.raises(ConfigError, match=r"blocks \[3, 5\] have experts"):
        write_timm(trained, tmp_path / "x", "shapes")
    with pytest.raises(ConfigError, match="has the tasks shapes, fractals, and a timm network has one head"):
        write_timm(plain, tmp_path / "x")
    for changes, why in (
        ({"plan__drop_blocks": [1]}, r"tokens are dropped in blocks \[1\]"),
        ({"adapter": "lora"}, "it has adapters"),
    ):
        assert re.search(why, beyond_timm(make_config(tmp_path, **PLAIN | changes)))
    assert not (tmp_path / "x").exists()
