"""Test the wheel without a clone: build it, unpack it elsewhere and use it from an empty directory."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import fresh
import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("moe_bsr", "tasks", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")

pytest.importorskip("setuptools", reason="builds a wheel with the setuptools of this environment")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Return the folder of the unpacked wheel. The wheel is built from a copy that has no old build/ folder."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / "source")
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"  # what pip calls
    subprocess.run([sys.executable, "-c", build], cwd=folder / "source", check=True, stdout=subprocess.DEVNULL)
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as wheel:
        wheel.extractall(folder / "installed")
    return folder / "installed"


def run(installed: Path, directory: Path, code: str, monkeypatch) -> str:
    """Run Python code in a directory with the wheel's package instead of the clone's, and return its output."""
    monkeypatch.chdir(directory)
    done = fresh.run(USE_THE_WHEEL + code, installed)
    assert done.returncode == 0, done.stderr
    return done.stdout


USE_THE_WHEEL = """
import sys
from pathlib import Path
for name in [name for name in sys.modules if name.partition(".")[0] == "moe_bsr"]:
    del sys.modules[name]  # the clone's
sys.path.insert(0, sys.argv[1])
import moe_bsr
assert Path(moe_bsr.__file__).parents[1] == Path(sys.argv[1])
"""


def test_the_wheel_contains_every_file_and_the_console_command(installed):
    package = installed / "moe_bsr"
    for kind in ("tasks", "configs"):
        assert sorted(p.name for p in (package / kind).iterdir()) == sorted(p.name for p in (ROOT / kind).iterdir())
    assert (package / "py.typed").is_file() and list((package / "weights").glob("*.safetensors"))
    modules = {str(path.relative_to(ROOT / "moe_bsr")) for path in (ROOT / "moe_bsr").rglob("*.py")}
    assert {str(path.relative_to(package)) for path in package.rglob("*.py")} == modules
    (about,) = installed.glob("*.dist-info")
    assert (about / "entry_points.txt").read_text() == "[console_scripts]\nmoe-bsr = moe_bsr.cli.main:start\n"
    assert sorted(installed.iterdir()) == sorted([package, about])


def test_the_quickstart_dry_run_copy_and_lists_work_from_any_directory(installed, tmp_path, monkeypatch):
    code = """if True:
        import os
        from moe_bsr.cli.main import main
        assert main(["train", "configs/quickstart.yaml", "--dry-run"]) == 0 and not os.listdir()
        print("END")
        commands = ["copy quickstart", "copy pets tasks", "configs", "tasks"]
        assert [main(command.split()) for command in commands] == [0] * 4
    """
    planned, printed = run(installed, tmp_path, code, monkeypatch).split("END\n")
    assert "fractals: 12 classes" in planned and "run folder runs/quickstart" in planned
    assert (tmp_path / "quickstart.yaml").is_file()
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.strip()}
    assert "quickstart_last" in rows and rows["pets"][3] == "tasks/pets.yaml" and rows["shapes"][3] == "packaged"
