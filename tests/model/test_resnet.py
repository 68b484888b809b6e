"""ResNet backbones: the same results and gradients as timm, what changes in training, and refused settings."""

import copy

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from tiny_models import CLASSES, gradients, normal

from moe_bsr.config import BackboneConfig, Config, ConfigError, PlanConfig
from moe_bsr.cost.predict import predict
from moe_bsr.model import summary
from moe_bsr.model.backbones import family_of, require_tokens
from moe_bsr.model.backbones.resnet import ResidualNetwork, create_on_meta, image_settings, load
from moe_bsr.model.multitask import MultitaskViT, build_on_meta

NAME = "resnet10t"
CHANNELS = {"channels": (8, 16, 16, 24), "stem_width": 8}
KINDS = {
    "bottleneck": (Bottleneck, (1, 2, 1, 1), {}),
    "basic, deep stem, pooled shortcut": (BasicBlock, (2, 1, 1, 2), {"stem_type": "deep_tiered", "avg_down": True}),
    "groups": (Bottleneck, (1, 1, 1, 1), {"cardinality": 4, "base_width": 16}),
}


def make_resnet(kind: str = "bottleneck") -> ResNet:
    """Return a small ResNet with random norm statistics, so that a change of them is visible."""
    block, layers, options = KINDS[kind]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        resnet = ResNet(block, layers, num_classes=0, zero_init_last=False, **(CHANNELS | options))
        for part in resnet.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.weight.uniform_(0.5, 1.0)
                part.bias.normal_(0, 0.2)
                part.running_mean.normal_(0, 0.2)
                part.running_var.uniform_(0.5, 2.0)
    resnet.pretrained_cfg = {"input_size": (3, 32, 32)}
    return resnet.eval()


def make_model(kind: str = "bottleneck", storage="exact", **plan) -> MultitaskViT:
    plan = PlanConfig(**{"train_blocks": [1, 3], "drop_blocks": [], "moe_blocks": []} | plan)
    config = Config(backbone=BackboneConfig(name=NAME), plan=plan, storage=storage)
    return MultitaskViT(ResidualNetwork(make_resnet(kind)), config, CLASSES).train()


def step(model: MultitaskViT) -> torch.Tensor:
    """Run a backward pass for two images of task "one"; return the logits."""
    logits = model(normal(2, 3, 32, 32), "one").logits
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
    return logits.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_timms_in_evaluation_mode(kind):
    model, resnet = make_model(kind, train_blocks="all"), make_resnet(kind)
    logits = step(model)
    theirs = torch.nn.functional.linear(
        resnet(normal(2, 3, 32, 32)), model.heads["one"].weight, model.heads["one"].bias
    )
    torch.testing.assert_close(logits, theirs.detach())
    torch.nn.functional.cross_entropy(theirs, torch.tensor([0, 2])).backward()
    stages = [block for stage in (1, 2, 3, 4) for block in getattr(resnet, f"layer{stage}")]
    for ours, plain in zip(
        (model.vit.conv1, model.vit.bn1, *model.vit.blocks), (resnet.conv1, resnet.bn1, *stages), strict=True
    ):
        for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_feature_maps_have_the_announced_sizes(kind):
    model = make_model(kind, train_blocks=[])
    with torch.no_grad():
        found = [model.forward_features(normal(1, 3, 32, 32), upto=n + 1)[0].x for n in range(len(model.plan))]
    assert [(x.shape[1], x.shape[2]) for x in found] == model.vit.maps()


@pytest.mark.parametrize("weights", ["all", "norm", "bias"])
def test_only_the_named_blocks_change_and_no_statistics_do(weights):
    model = make_model(train_weights=weights)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        step(model)
        optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    norms = [name for name, part in model.vit.named_modules() if isinstance(part, torch.nn.BatchNorm2d)]
    kinds = {
        "all": lambda name: True,
        "norm": lambda name: name.rpartition(".")[0] in norms,
        "bias": lambda name: name.endswith(".bias"),
    }
    blocks = [(f"vit.blocks.{index}.", block) for index, block in enumerate(model.vit.blocks) if index in (1, 3)]
    names = {place + name for place, block in blocks for name, _ in block.named_parameters()}
    chosen = {name for name in names if kinds[weights](name.removeprefix("vit."))}
    assert moved == chosen | {"heads.one.weight", "heads.one.bias"}
    assert model.path_start == 1 and not model.forward_features(normal(1, 3, 32, 32))[0].x.requires_grad


@pytest.mark.parametrize("blocks", [[1, 3], "all"])
def test_recomputation_gives_bitwise_equal_gradients(blocks):
    models = [make_model(storage=storage, train_blocks=blocks) for storage in ("exact", "recompute")]
    logits = [step(model) for model in models]
    assert torch.equal(*logits)
    exact, again = map(gradients, models)
    assert exact.keys() == again.keys() and all(torch.equal(exact[name], again[name]) for name in exact)


def test_a_checkpoint_holds_only_trained_weights():
    model = make_model()
    saved = model.state_dict().keys() - model.unchanged_backbone_names()
    assert {name for name in saved if "running" in name} == set()
    assert all(name.startswith(("vit.blocks.1.", "vit.blocks.3.", "heads.", "balance.")) for name in saved)


def test_flops_and_memory_of_resnet_50_equal_the_papers():
    plan = PlanConfig(train_blocks=[6, 12, 15], drop_blocks=[], moe_blocks=[])
    config = Config(backbone=BackboneConfig(name="resnet50"), plan=plan)
    model = build_on_meta(config, {"cifar10": 10})
    assert len(model.plan) == 16 and model.image_size == 224
    with torch.device("meta"):
        layer = timm.create_model("resnet50", num_classes=0)
    trained = [layer.layer2[3], layer.layer3[5], layer.layer4[2]]
    sizes = [sum(p.numel() for p in block.parameters()) for block in trained]
    assert [sum(p.numel() for p in model.vit.blocks[i].parameters()) for i in (6, 12, 15)] == sizes
    cost = predict(model, config, batch=1, precision="fp32", scratch=False)
    assert cost.forward_flops / 2e9 == pytest.approx(4.087, abs=0.001)
    assert cost.kept / 1e6 == pytest.approx(4.72, abs=0.01)  # the paper's rule charges 4.61 of it
    lines = summary.table(model, config)
    assert lines[0].split()[:4] == ["block", "trains", "gradient", "maps"]
    assert [number for number, line in enumerate(lines[1:]) if " yes     yes" in line] == [6, 12, 15]


def test_a_weights_file_is_read_by_timms_names_with_or_without_prefix(tmp_path):
    resnet = timm.create_model(NAME, num_classes=7)
    file = tmp_path / "resnet.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in resnet.state_dict().items()}}, file)
    network = load(BackboneConfig(name=NAME, weights=str(file), image_size=64))
    assert torch.equal(network.blocks[2].conv1.weight, resnet.layer3[0].conv1.weight)
    assert torch.equal(network.blocks[2].bn1.running_var, resnet.layer3[0].bn1.running_var)
    assert network.image_size == 64 and "module." in network.weights_notes[-1]
    settings = image_settings(BackboneConfig(name=NAME), create_on_meta(BackboneConfig(name=NAME)))
    assert settings.size == 176 and settings.mean == (0.485, 0.456, 0.406)
    with pytest.raises(ConfigError, match=r"does not fit resnet18: .*missing"):
        load(BackboneConfig(name="resnet18", weights=str(file)))


@pytest.mark.parametrize(
    ("name", "word"),
    [("seresnet50", "SEModule"), ("resnet50_gn", "GroupNorm"), ("resnetaa50", "pools within"), ("resnet50.x", "tag")],
)
def test_other_resnets_are_refused_with_the_unsupported_part(name, word):
    with pytest.raises(ConfigError, match=word) as error:
        create_on_meta(BackboneConfig(name=name))
    assert str(error.value).startswith(f"backbone.name = '{name}': ")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"drop_blocks": [1]}, "plan.drop_blocks"),
        ({"moe_blocks": [1]}, "plan.moe_blocks"),
        ({"head_blocks": [0]}, "plan.head_blocks"),
        ({"train_weights": "proj"}, "plan.train_weights"),
        ({"storage": "int8"}, "storage"),
        ({"storage": "recompute_int8"}, "storage"),
        ({"adapter": "lora"}, "adapter"),
    ],
)
def test_settings_for_tokens_are_refused_with_their_key(changes, key):
    plan = {"train_blocks": [1], "drop_blocks": [], "moe_blocks": []}
    plan |= {name: value for name, value in changes.items() if name not in ("storage", "adapter")}
    rest = {name: value for name, value in changes.items() if name in ("storage", "adapter")}
    config = Config(backbone=BackboneConfig(name=NAME), plan=PlanConfig(**plan), **rest)
    with pytest.raises(ConfigError, match="is a ResNet") as error:
        build_on_meta(config, CLASSES)
    assert str(error.value).startswith(f"{key} = ")


def test_commands_that_need_tokens_refuse_a_resnet():
    require_tokens(BackboneConfig(), "export")
    assert family_of(BackboneConfig(name="resnet50.a1_in1k")).of_tokens is False
    with pytest.raises(ConfigError, match="'resnet50.a1_in1k': is not a Vision Transformer, and export"):
        require_tokens(BackboneConfig(name="resnet50.a1_in1k"), "export")
