"""The wheel, as somebody has it who has no clone: built, unpacked elsewhere, used from an empty directory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("moe_bsr", "tasks", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")

pytest.importorskip("setuptools", reason="builds a wheel with the setuptools of this environment")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that the wheel was unpacked into. It is built from a copy, beside which no old build/ lies."""
    place = tmp_path_factory.mktemp("wheel")
    (place / "source").mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, place / "source")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", place, place / "source"]
    subprocess.run(wheel, check=True)
    (file,) = place.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", place / "installed", file], check=True)
    return place / "installed"


def run(installed: Path, place: Path, *arguments: str) -> str:
    """Run Python with the wheel, and not with the clone, in a directory; returns what it printed."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    call = [sys.executable, *arguments]
    done = subprocess.run(call, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_carries_every_file_and_the_console_command(installed):
    package = installed / "moe_bsr"
    for kind in ("tasks", "configs"):
        assert sorted(p.name for p in (package / kind).iterdir()) == sorted(p.name for p in (ROOT / kind).iterdir())
    assert (package / "py.typed").is_file() and list((package / "weights").glob("*.safetensors"))
    modules = {str(path.relative_to(ROOT / "moe_bsr")) for path in (ROOT / "moe_bsr").rglob("*.py")}
    assert {str(path.relative_to(package)) for path in package.rglob("*.py")} == modules
    assert (installed / "bin" / "moe-bsr").is_file()
    where = run(installed, installed, "-c", "import moe_bsr; print(moe_bsr.__file__)")
    assert Path(where.strip()) == package / "__init__.py"
    assert sorted(path.name for path in installed.iterdir() if "." not in path.name) == ["bin", "moe_bsr"]


def test_the_quickstart_is_ready_to_train_from_any_directory_and_files_are_copied_and_listed(installed, tmp_path):
    code = """if True:
        import os
        from moe_bsr.cli.main import main
        assert main(["train", "configs/quickstart.yaml", "--dry-run"]) == 0 and not os.listdir()
        print("END")
        commands = ["copy quickstart", "copy pets tasks", "configs", "tasks"]
        assert [main(command.split()) for command in commands] == [0] * 4
    """  # in one process: each would load torch anew
    planned, printed = run(installed, tmp_path, "-c", code).split("END\n")
    assert "fractals: 12 classes" in planned and "run folder runs/quickstart" in planned
    assert (tmp_path / "quickstart.yaml").is_file()
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.strip()}
    assert "quickstart_last" in rows and rows["pets"][3] == "tasks/pets.yaml" and rows["shapes"][3] == "packaged"
