"""Two tasks of noise images, and models with confident answers, for tests of evaluations and predictions."""

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from moe_bsr import config as configuration
from moe_bsr.data import ImageTransforms, Split, TaskData
from moe_bsr.data.sources.folder import FolderTask
from moe_bsr.model.multitask import MultitaskViT
from moe_bsr.runtime.device import Runtime

CPU = Runtime(torch.device("cpu"), "fp32", 1, "asked for")
CLASSES = {"many": 7, "few": 3}
TRANSFORMS = ImageTransforms(size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_pct=1.0)


class Noise:
    """Random images of different sizes."""

    def __init__(self, labels, classes: int, seed: int) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = [f"class {i}" for i in range(classes)]
        self.seed = seed
        self.names = self.sizes = None

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, i))
        return rng.integers(0, 256, (16 + i % 3, 16 + i % 5, 3), dtype=np.uint8)


def task_data(name: str, labels=None) -> TaskData:
    """Return a task of 23 images, the same ones for each split."""
    classes = CLASSES[name]
    source = Noise(np.arange(23) % classes if labels is None else labels, classes, classes)
    split = Split(source, np.arange(len(source)), source.labels)
    spec = FolderTask(name=name, title=name, path="nowhere")
    return TaskData(
        name=name,
        title=name,
        class_names=source.class_names,
        train=split,
        val=split,
        test=split,
        origin="drawn",
        spec=spec,
    )


def network(classes: dict[str, int], depth: int, **plan) -> MultitaskViT:
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=depth, num_heads=2, num_classes=0)
    config = {"tasks": list(classes), "plan": plan, "moe": {"num_experts": 6, "top_k": 2}}
    return MultitaskViT(vit, configuration.from_dict(config), classes)


def decided_network() -> MultitaskViT:
    """Return a network whose answers are far from uniform. Blocks 1 and 3 have experts, 0 and 2 drop tokens."""
    torch.manual_seed(0)
    model = network(CLASSES, depth=4, train_blocks=[1, 3], drop_blocks=[0, 2], moe_blocks=[1, 3])
    for head in model.heads.values():
        torch.nn.init.normal_(head.weight)
    return model
