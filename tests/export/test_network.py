"""Test that exported graphs in onnxruntime compute the same as the model's own forward pass, for many plans."""

from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import CLASSES, KINDS, make_model, normal, scale_routers

pytest.importorskip("onnx", reason="the extra export")
ort = pytest.importorskip("onnxruntime", reason="the extra export")

import onnx  # noqa: E402
from timm import layers as timm_layers  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from torch import nn  # noqa: E402

from moe_bsr.config import ConfigError, TokensConfig  # noqa: E402
from moe_bsr.export.graph import Graph, Weights  # noqa: E402
from moe_bsr.export.network import Part, write  # noqa: E402

TASKS = ["one", "two"]
MOE = {"moe_blocks": (1, 3), "init_noise": 1.0}


def graph_of(parts: list[Part]) -> Graph:
    graph = Graph(Weights())
    images = graph.input("images", ["batch", 3, 16, 16])
    for part in parts:
        graph.output(write(graph, part, images), part.task, ["batch", CLASSES[part.task]])
    return graph


def session_of(graph: Graph):
    return ort.InferenceSession(graph.finish().inside().SerializeToString(), providers=["CPUExecutionProvider"])


def assert_same(model, batches=(3,), tolerance: float = 1e-4) -> Graph:
    """Assert that the exported graph gives the model's logits. With experts, both tasks are in one graph."""
    model.eval()
    scale_routers(model, 50.0)
    tasks = TASKS if model.balance.blocks else TASKS[1:]
    graph = graph_of([Part(model, task) for task in tasks])
    session = session_of(graph)
    for batch in batches:
        images = normal(batch, 3, 16, 16, seed=batch)
        for task, found in zip(tasks, session.run(tasks, {"images": images.numpy()}), strict=True):
            with torch.no_grad():
                expected = model(images, task).logits.numpy()
            assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())
            assert (found.argmax(1) == expected.argmax(1)).all()
    return graph


@pytest.mark.parametrize("kind", ["class-token", "registers", "average-pool", "attention-pool", "qk-norm"])
def test_token_merging(kind):
    """Three blocks merge tokens: some of the source tokens, all of them, and an odd number of tokens."""
    plan = {"train_blocks": "all", "drop_blocks": (0, 1, 2), "keep_rate": [0.9, 0.5, 0.7]}
    assert_same(make_model(kind, tokens=TokensConfig(reduce="merge"), **plan, **MOE))


def test_one_graph_takes_any_number_of_images():
    assert_same(make_model(**MOE), batches=(1, 2, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_backbones_of_every_kind_with_drops_and_experts(kind):
    assert_same(make_model(kind, **MOE))


@pytest.mark.parametrize(
    "plan",
    [
        {"train_blocks": "all", "drop_blocks": ()},
        {"train_blocks": (1, 3)},
        {"train_blocks": (), "drop_blocks": ()},
        {"drop_blocks": (), **MOE},
        {"keep_rate": [0.9, 0.3]},
    ],
    ids=["full", "BSR", "last layer", "MoE", "two rates"],
)
def test_plans(plan):
    assert_same(make_model(**plan))


@pytest.mark.parametrize(
    "options",
    [
        {"protect_fused": True},
        {"protect_fused": True, "fuse": "normalized"},
        {"fuse": "none"},
        {"rank_by": "logits"},
        {"detach_fusion_weights": True},
    ],
    ids=str,
)
def test_token_options(options):
    assert_same(make_model(tokens=TokensConfig(**options)))


@pytest.mark.parametrize("options", [{"protect_fused": True, "fuse": "normalized"}, {"rank_by": "logits"}], ids=str)
def test_token_options_without_a_class_token(options):
    """Token scores are then the mean attention that a token receives."""
    assert_same(make_model("average-pool", tokens=TokensConfig(**options)))


@pytest.mark.parametrize(
    "options",
    [
        {"router": "task_conditioned"},
        {"mlp_ratio": 1},
        {"renormalize_gates": False},
        {"top_k": 4},
        {"num_experts": 1, "top_k": 1, "renormalize_gates": False},
    ],
    ids=str,
)
def test_experts_and_routers(options):
    assert_same(make_model(**MOE, **options))


def test_experts_chosen_by_no_token_and_by_all_tokens():
    model = make_model("average-pool", **MOE)  # its last block routes all tokens, too
    direction = normal(16)
    with torch.no_grad():
        for index in (1, 3):
            block = model.vit.blocks[index]
            block.norm2.bias.add_(30 * direction)
            for weight in block.mlp.router.weight.values():
                weight[:2] += torch.outer(torch.tensor([0.021, 0.02]), direction)
    scale_routers(model, 0.02)
    assert_same(model)
    with torch.no_grad():
        chosen = [routing.experts for routing in model(normal(5, 3, 16, 16), "one").routing.values()]
    assert all(set(experts.flatten().tolist()) == {0, 1} for experts in chosen)


@pytest.mark.parametrize("options, names", [({"kind": "lora", "rank": 2}, "lora"), ({"kind": "factored"}, "left")])
def test_adapters_are_merged_in_the_graph_and_kept_in_the_model(options, names):
    model = make_model(adapter=options | {"layers": ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name or "left" in name:
                parameter.copy_(normal(*parameter.shape))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = assert_same(model)
    assert any(names in name for name in before) and not any(names in name for name in graph.used)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_adapter_beside_the_ffn_is_part_of_the_graph():
    model = make_model(adapter={"kind": "adaptformer", "width": 3}, **MOE)
    for parameter in model.vit.blocks[1].beside_ffn.parameters():
        parameter.data.copy_(normal(*parameter.shape))
    assert_same(model)


@pytest.mark.parametrize("reduce", ["drop", "merge"])
@pytest.mark.parametrize(("kind", "published"), [("class-token", False), ("average-pool", True)])
def test_repnet_adapters_are_part_of_the_graph(kind, published, reduce):
    options = {"kind": "repnet", "published": published, "blocks": [1, 2, 3]}
    model = make_model(kind, train_blocks=(), adapter=[options], tokens=TokensConfig(reduce=reduce))
    for parameters in model.adapter_parameters.values():
        for i, parameter in enumerate(parameters):
            parameter.data.add_(0.2 * normal(*parameter.shape, seed=i))
    assert_same(model)


ODD_LAYERS = {
    "SwiGLU, RMS norms": {"mlp_layer": timm_layers.SwiGLU, "norm_layer": timm_layers.RmsNorm, "act_layer": nn.SiLU},
    "packed SwiGLU": {"mlp_layer": timm_layers.SwiGLUPacked, "act_layer": nn.SiLU},
    "gate behind": {"mlp_layer": partial(timm_layers.GluMlp, gate_last=True), "act_layer": nn.Sigmoid},
    "quick GELU, norm in the FFN": {"act_layer": timm_layers.QuickGELU, "scale_mlp_norm": True},
    "tanh GELU, norm before the head": {"act_layer": timm_layers.GELUTanh, "final_norm": False, "fc_norm": True},
    "largest and mean": {"global_pool": "avgmax"},
    "attention pool and registers": {"class_token": False, "reg_tokens": 2, "global_pool": "map", "qk_norm": True},
}


@pytest.mark.parametrize("options", ODD_LAYERS.values(), ids=ODD_LAYERS)
def test_layers_of_other_backbones(options):
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 0}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        vit = VisionTransformer(**small | options)
        for parameter in vit.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    assert_same(make_model(vit=vit))


def test_an_unknown_layer_is_refused_with_its_name():
    model = make_model()
    model.vit.blocks[2].mlp.act = nn.Mish()
    with pytest.raises(ConfigError, match="blocks.2.mlp.act is a Mish, which cannot be exported to ONNX"):
        graph_of([Part(model, "one")])


def test_a_router_that_is_not_linear_is_refused():
    model = make_model(**MOE)
    model.vit.blocks[1].mlp.router.forward = lambda x, task: x[:, :4] ** 2
    with pytest.raises(ConfigError, match="moe.router: a PerTaskRouter is not linear"):
        graph_of([Part(model, "one")])


def test_heads_may_read_class_tokens_of_earlier_blocks():
    model = make_model(train_blocks=(), drop_blocks=(1,))
    model.head_blocks = [0, 2]
    for task, classes in CLASSES.items():
        model.heads[task] = nn.Linear(3 * 16, classes)
    assert_same(model)


def test_tasks_in_one_graph_share_everything_before_the_first_router():
    model = make_model(**MOE).eval()
    alone = [len(graph_of([Part(model, task)]).nodes) for task in TASKS]
    together = graph_of([Part(model, task) for task in TASKS])
    kinds = [node.op_type for node in together.nodes]
    # Blocks 0 and 1 attend once, 2 and 3 once for each task. Blocks 1 and 3 route once for each task.
    assert kinds.count("Conv") == 1 and kinds.count("Softmax") == 2 + 2 * 2 + 2 * 2
    assert len(together.nodes) < sum(alone)
    owners = together.weights.owners
    assert {name for name, owner in owners.items() if owner} == {
        f"{task}/{name}"
        for task in TASKS
        for name in ("blocks.1.mlp.router.weight", "blocks.3.mlp.router.weight", "head.weight", "head.bias")
    }


def test_two_models_share_only_equal_blocks():
    first, second = make_model(), make_model()
    with torch.no_grad():
        second.vit.blocks[1].mlp.fc1.weight.add_(1.0)
    parts = [Part(first, "one", shared_blocks=1), Part(second, "two", shared_blocks=1)]
    session = session_of(graph_of(parts))
    images = normal(3, 3, 16, 16)
    for part, found in zip(parts, session.run(TASKS, {"images": images.numpy()}), strict=True):
        with torch.no_grad():
            np.testing.assert_allclose(found, part.model.eval()(images, part.task).logits.numpy(), atol=1e-4)
    with pytest.raises(ValueError, match="blocks.1.mlp.fc1.weight: two tasks have different values"):
        graph_of([Part(first, "one"), Part(second, "two")])


def test_a_graph_is_valid_onnx_of_the_default_domain():
    model = graph_of([Part(make_model(**MOE).eval(), task) for task in TASKS]).finish().inside()
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""} and [each.domain for each in model.opset_import] == [""]


def test_openvino_reads_the_same_graph(tmp_path):
    openvino = pytest.importorskip("openvino")
    model = make_model(**MOE).eval()
    scale_routers(model, 200.0)
    onnx.save(graph_of([Part(model, task) for task in TASKS]).finish().inside(), tmp_path / "model.onnx")
    compiled = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (1, 3):
        images = normal(batch, 3, 16, 16, seed=batch)
        found = compiled(images.numpy())
        for task in TASKS:
            with torch.no_grad():
                np.testing.assert_allclose(found[task], model(images, task).logits.numpy(), atol=1e-4, rtol=1e-4)
