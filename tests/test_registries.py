"""Test all registered entries in the same way, as timm tests its models. New entries are included automatically.

A tiny run of two tasks uses the entry, takes one update, and is saved and loaded. The update may change only the
parameters that plan and entry declare as trained. The predicted cost of the entry is compared with the measured cost.
"""

from pathlib import Path

import pytest
import torch
from measured_cost import assert_predicted_is_measured
from tiny_data import TASK_FILES
from tiny_runs import make_config, make_trainer, state_of

import moe_bsr
from moe_bsr.config import Config
from moe_bsr.data import SOURCES
from moe_bsr.data.sampler import SAMPLERS
from moe_bsr.model.adapters import ADAPTERS
from moe_bsr.model.backbones import BACKBONES
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.model.routers import ROUTERS
from moe_bsr.model.storage import STORAGES

pytestmark = pytest.mark.usefixtures("light")

# A small network of each backbone family: (name, image size in pixels).
SMALLEST = {"resnet": ("resnet10t", 32), "vit": ("test_vit", 32)}
PLAN = {"plan__train_blocks": [3, 5], "plan__drop_blocks": [3], "plan__moe_blocks": [5]}
MAPS = {"plan__train_blocks": [1], "plan__drop_blocks": [], "plan__moe_blocks": []}  # for backbones without tokens

# Registry -> (its entries, function from an entry's name to the changes of a configuration that select it).
CHOICES = {
    "storage": (STORAGES, lambda kind: {"storage": kind}),
    "router": (ROUTERS, lambda kind: {"moe__router": kind}),
    "sampler": (SAMPLERS, lambda kind: {"sampler__kind": kind}),
    "adapter": (
        ADAPTERS,
        lambda kind: (
            {"adapter": kind, "plan__moe_blocks": []} | ({"plan__train_blocks": []} if kind == "ladder" else {})
        ),
    ),
    "backbone": (
        BACKBONES,
        lambda kind: (
            {"backbone__name": SMALLEST[kind][0], "backbone__image_size": SMALLEST[kind][1]}
            | ({} if BACKBONES[kind].of_tokens else MAPS)
        ),
    ),
    "source": (SOURCES, lambda kind: {}),  # `configuration` selects it by the task file
}
ENTRIES = [(registry, kind) for registry, (entries, _) in CHOICES.items() for kind in entries]
IN_THE_MODEL = [entry for entry in ENTRIES if entry[0] not in ("sampler", "source")]


def configuration(registry: str, kind: str, folder: Path, **changes) -> Config:
    """Return a run of one update of a small model with experts and token dropping that uses the entry."""
    settings = PLAN | {"train__steps": 1, "train__evaluate_test": False, "moe__init_noise": 0.1}
    config = make_config(folder, **settings | CHOICES[registry][1](kind) | changes)
    if registry == "source":
        tasks = [str(TASK_FILES[kind](folder)), config.tasks[1]]
        config = moe_bsr.config.replace(config, tasks=tasks, data__root=str(folder))
    return config


def belongs_to(name: str, tasks: set[str]) -> bool:
    """Return whether a parameter belongs only to one of these tasks: a part of its name is the task's name."""
    return bool(tasks & set(name.split(".")))


def declared(model: MultitaskViT, visited: list[str]) -> set[str]:
    """Return what an update for these tasks may change: trained parameters except other tasks' heads and routers."""
    others = set(model.tasks) - set(visited)
    return {name for name, p in model.named_parameters() if p.requires_grad and not belongs_to(name, others)}


@pytest.mark.parametrize(("registry", "kind"), ENTRIES)
def test_an_update_changes_the_declared_parameters_and_a_checkpoint_restores_them(registry, kind, tmp_path):
    config = configuration(registry, kind, tmp_path)
    trainer = make_trainer(config, tmp_path / "run")
    before = state_of(trainer.model)
    parameters = dict(trainer.model.named_parameters())
    trainer.fit()

    after = state_of(trainer.model)
    assert after.keys() == before.keys()
    moved = {name for name in parameters if not torch.equal(before[name], after[name])}
    # Parameters followed by zero-initialized ones have no gradient yet, and biases have no weight decay.
    behind_zeros = ("beside_ffn.down.", "beside_block.", "ladder.side.", "ladder.norm.", "vit.blocks.1.bn1.")
    still = {name for name, p in parameters.items() if p.ndim < 2 and any(each in name for each in behind_zeros)}
    assert moved | still == declared(trainer.model, trainer.sampler.tasks(0))
    assert any(name.startswith("heads.") for name in moved) and len(moved) < len(parameters)

    loaded = moe_bsr.load(tmp_path / "run", "last")
    for task in trainer.tasks:
        again = loaded.models[task].state_dict()
        assert again.keys() == after.keys()
        assert [name for name in after if not torch.equal(again[name], after[name])] == []


@pytest.mark.parametrize(("registry", "kind"), IN_THE_MODEL)
def test_predicted_cost_equals_measured_cost(registry, kind, tmp_path):
    config = configuration(registry, kind, tmp_path)
    assert_predicted_is_measured(config)


class AnotherTasksRouter(ROUTERS["per_task"]):
    """Faulty router: it routes a task's tokens with another task's weights."""

    def forward(self, x, task):
        return super().forward(x, next(name for name in self.weight if name != task))


def test_a_faulty_entry_fails_the_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(ROUTERS, "_entries", dict(ROUTERS._entries))
    ROUTERS.register("wrong")(AnotherTasksRouter)
    with pytest.raises(AssertionError, match="router"):
        test_an_update_changes_the_declared_parameters_and_a_checkpoint_restores_them("router", "wrong", tmp_path)


def test_every_registry_is_swept():
    assert {registry for registry, _ in ENTRIES} == CHOICES.keys()
