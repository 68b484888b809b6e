"""Export uses the reference operators: plain operators only, any number of images, the same logits."""

import pytest
import torch
from tiny_models import KINDS, make_model, normal

from moe_bsr import ops
from moe_bsr.config import TokensConfig


class Classifier(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images, self.task).logits


@pytest.mark.parametrize(
    ("kinds", "reduce"), [(["registers", "layer-scale"], "drop"), (["average-pool"], "merge")], ids=["drop", "merge"]
)
def test_dense_bsr_is_exported_with_dynamic_batch(kinds, reduce, monkeypatch):
    """The network has only two blocks, because the export takes seconds."""
    small = {key: value for kind in kinds for key, value in KINDS[kind].items()} | {"depth": 2}
    monkeypatch.setitem(KINDS, "small", small)
    model = make_model("small", tokens=TokensConfig(reduce=reduce), train_blocks=[1], drop_blocks=[0])
    classifier = Classifier(model.eval(), "two")
    batch = torch.export.Dim("batch", min=1, max=64)
    with ops.reference(), torch.no_grad():
        program = torch.export.export(classifier, (normal(2, 3, 16, 16),), dynamic_shapes=({0: batch},))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("mkldnn" in name or "for_cpu" in name for name in operators)
    for images in (normal(1, 3, 16, 16, seed=1), normal(5, 3, 16, 16, seed=2)):
        with torch.no_grad():
            torch.testing.assert_close(program.module()(images), classifier(images), rtol=1e-4, atol=1e-5)


def test_uint8_images_are_refused():
    with pytest.raises(TypeError, match="images are torch.uint8: normalize them first"):
        make_model()(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "one")
