"""Test that exported graphs of low-rank experts and covering slices compute the same as the model, for each gate."""

import numpy as np
import pytest
import torch
from tiny_models import CLASSES, make_model, normal, scale_routers

pytest.importorskip("onnx", reason="the extra export")
ort = pytest.importorskip("onnxruntime", reason="the extra export")

from moe_bsr.export.fewer_experts import most_used, reduced  # noqa: E402
from moe_bsr.export.graph import Graph, Weights  # noqa: E402
from moe_bsr.export.network import Part, write  # noqa: E402

TASKS = ["one", "two"]
IMAGES = normal(3, 3, 16, 16)


def graph_of(model, part=lambda model, task: Part(model, task)) -> Graph:
    """Write both tasks into one graph, assert that its outputs are the models' logits, and return it."""
    graph = Graph(Weights())
    images = graph.input("images", ["batch", 3, 16, 16])
    parts = [part(model, task) for task in TASKS]
    for each in parts:
        graph.output(write(graph, each, images), each.task, ["batch", CLASSES[each.task]])
    session = ort.InferenceSession(graph.finish().inside().SerializeToString(), providers=["CPUExecutionProvider"])
    for each, found in zip(parts, session.run(TASKS, {"images": IMAGES.numpy()}), strict=True):
        with torch.no_grad():
            expected = each.model(IMAGES, each.task).logits.numpy()
        assert np.abs(found - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())
    return graph


def decided(**options):
    model = make_model(moe_blocks=(1, 3), **options).eval()
    for index in model.balance.blocks:
        for seed, parameter in enumerate(model.vit.blocks[index].mlp.experts.parameters()):
            parameter.data.add_(0.3 * normal(*parameter.shape, seed=seed))
    if options.get("gate") not in ("task", "constant"):
        scale_routers(model, 50.0)
    return model


@pytest.mark.parametrize("gate", ["token", "image", "task", "constant"])
def test_low_rank_experts(gate):
    graph = graph_of(decided(experts="low_rank", rank=3, gate=gate))
    routers = [node.name for node in graph.nodes if node.name.endswith("router")]
    assert len(routers) == (4 if gate in ("token", "image") else 0), "fixed gates are in the weights"
    owners = {name.split("vit.")[0].split("blocks.")[0] for name in graph.used if ".experts." in name}
    assert owners == {"task": {"one/", "two/"}, "constant": set()}.get(gate, {""})


@pytest.mark.parametrize("options", [{"experts": "covering_slices"}, {"gate": "image"}], ids=["slices", "image"])
def test_covering_slices_and_image_gates(options):
    graph_of(decided(**{"num_experts": 4, "top_k": 2} | options))


@pytest.mark.parametrize("gate", ["token", "task"])
def test_fewer_low_rank_experts(gate):
    model = decided(experts="low_rank", rank=3, gate=gate)
    count = 3 if gate == "token" else 4

    def part(model, task):
        kept = most_used(model, task, [IMAGES], count)
        return Part(reduced(model, task, kept), task, experts=kept)

    graph_of(model, part)
