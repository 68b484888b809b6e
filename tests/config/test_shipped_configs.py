"""The shipped configurations and tasks load, fit their backbones, and state how to run them."""

from functools import cache
from pathlib import Path

import pytest
import yaml

from moe_bsr.config import BackboneConfig, Config, load, to_dict
from moe_bsr.data import load_spec
from moe_bsr.model.backbones import family_of
from moe_bsr.model.plan import make_plan

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
EXPERIMENTS = [path for path in CONFIGS if path.stem != "base"]
TASKS = sorted((ROOT / "tasks").glob("*.yaml"))


@cache
def depth(name: str) -> int:
    config = BackboneConfig(name=name)
    return len(family_of(config).create_on_meta(config).blocks)


def header(path: Path) -> str:
    """Return the comment lines at the start of a file."""
    lines = path.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(lines[:first])


def keys(tree: dict) -> list:
    return [(key, keys(value)) if isinstance(value, dict) else key for key, value in tree.items()]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_loads_and_its_plan_fits_its_backbone(path):
    config = load(path)
    assert len(make_plan(config, depth(config.backbone.name))) == depth(config.backbone.name)
    for task in config.tasks:
        load_spec(task if not task.endswith((".yaml", ".yml")) else ROOT / task)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_has_only_differences_and_states_how_to_run_it(path):
    assert len(path.read_text().splitlines()) < 30
    assert f"moe-bsr train configs/{path.name}" in header(path)
    assert "extends" in yaml.safe_load(path.read_text())


def test_base_yaml_lists_all_defaults_in_order():
    tree = yaml.safe_load((ROOT / "configs" / "base.yaml").read_text())
    default = to_dict(Config())
    assert keys(tree) == keys(default)
    assert to_dict(load(ROOT / "configs" / "base.yaml")) == default


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_a_task_loads_by_its_name_from_any_directory(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = load_spec(path.stem)
    assert spec == load_spec(path) and spec.name == path.stem
    assert spec.title and spec.classes >= 2 and spec.license != "not stated"


def test_the_default_tasks_and_the_five_datasets_are_shipped():
    five = {"cifar10", "cifar100", "flowers102", "pets", "food101"}
    assert {path.stem for path in TASKS} >= five | set(Config().tasks)
