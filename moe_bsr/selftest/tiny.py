"""Configuration of a run that trains in a second or two, with every feature that could make a resumed run differ."""

from pathlib import Path

from moe_bsr import config as configuration
from moe_bsr.config import Config

STEPS = 9
TASKS = {"shapes": (10, 30), "fractals": (12, 50)}  # classes, images before some are held out for validation
TASK = """title: {name}
source: generated
family: {name}
classes: {classes}
train: {train}
test: {classes}
crop_scale: [0.5, 1.0]
license: generated
"""


def write_config(folder: Path, **changes: object) -> tuple[Config, Path]:
    """Write task files and a configuration into a folder, and return the configuration and its file.

    It has unequal tasks, augmentation, gate noise, a moving average, gradient accumulation, clipping, and a balance
    loss with running statistics.

    Args:
        changes: values of other keys, such as `train__steps=4`.
    """
    tasks = []
    for name, (classes, images) in TASKS.items():
        file = folder / f"{name}.yaml"
        file.write_text(TASK.format(name=name, classes=classes, train=images))
        tasks.append(str(file))
    config = configuration.from_dict(
        {
            "tasks": tasks,
            "backbone": {"name": "test_vit", "weights": "random", "image_size": 32},
            "plan": {"train_blocks": [1, 3, 5], "drop_blocks": [1, 3], "moe_blocks": [3, 5]},
            "moe": {"num_experts": 4, "top_k": 2, "mlp_ratio": 3, "gate_noise": 1.0, "balance_loss": "across_tasks"},
            "sampler": {"kind": "temperature"},
            "train": {
                "steps": STEPS,
                "batch_size": 8,
                "grad_accumulation_steps": 2,
                "ema_decay": 0.9,
                "grad_clip_norm": 0.5,
                "lr": 3e-3,
                "eval_every": 5,
                "checkpoint_every": 3,
                "evaluate_test": False,
            },
            "runtime": {"precision": "fp32", "threads": 1, "device": "cpu"},
        }
    )
    config = configuration.replace(config, **changes)
    file = folder / "selftest.yaml"
    file.write_text(configuration.dump(config))
    return config, file
