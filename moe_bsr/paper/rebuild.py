"""Recompute the published figures by the rules that produced them, and compare."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moe_bsr.paper import autograd_rule, backrazor_rule, bsr_rule, resnet
from moe_bsr.paper.bsr_rule import FLOAT, MB
from moe_bsr.paper.settings import Setting, ours, shape

TOLERANCE = 0.003
BATCH = 128


@dataclass(frozen=True, slots=True)
class Rule:
    """A way to compute figures.

    Attributes:
        text: description of what the rule counts, for the page.
        rebuild: computes a figure from its setting and arguments.
    """

    text: str
    rebuild: Callable[..., float]


def kept_by_ours(setting: Setting) -> float | None:
    cost = ours(setting, BATCH)
    return None if cost is None else cost.kept / BATCH / MB


# MB that a setting keeps per image for the backward pass, by way of counting. None: the setting is not covered.
KEPT: dict[str, Callable[[Setting], float | None]] = {
    "paper's rule": lambda setting: bsr_rule.memory(shape(setting)).activations_mb,
    "autograd, plain PyTorch": lambda setting: sum(autograd_rule.kept(shape(setting)).values()) / MB,
    "our code": kept_by_ours,
}


def giga(macs: float) -> float:
    return macs / 1e9


def on_device(setting: Setting, batch: int) -> float:
    whole = shape(setting)
    kept = sum(autograd_rule.kept(whole).values())
    return (batch * kept + 3 * FLOAT * whole.trainable + FLOAT * whole.frozen) / MB


def tensor(setting: Setting, which: str, times: int = 1) -> float:
    """Return the MB of one kept tensor of a full-length block (Table 1), or of all that the block keeps."""
    block = shape(setting).blocks[-1]
    token = FLOAT * block.leaves[0].input
    sizes = {
        "qkv": bsr_rule.attention_kept(block) - FLOAT * block.heads * block.tokens**2,
        "map": FLOAT * block.heads * block.tokens**2,
        "gelu": 4 * token,
        "token": token,
        "block": bsr_rule.attention_kept(block) + sum(bsr_rule.kept(leaf, True) for leaf in block.leaves),
    }
    return times * sizes[which] / MB


def memory_ratio(setting: Setting, over: Setting, batch: int) -> float:
    return bsr_rule.memory(shape(over), batch).total / bsr_rule.memory(shape(setting), batch).total


RULES = {
    "paper": Rule(
        "The paper's released estimator: batch x the peak activations of an image + 4 bytes for each "
        "trainable and 1 byte for each frozen parameter. A trained linear layer or norm keeps its input, an "
        "activation function on the gradient path its input, an attention on the gradient path its map and "
        "q, k, v.",
        lambda setting, batch: bsr_rule.memory(shape(setting), batch).total_mb,
    ),
    "paper, activations": Rule(
        "The activation term of `paper` alone, for one image.",
        lambda setting: bsr_rule.memory(shape(setting)).activations_mb,
    ),
    "paper, one tensor": Rule("One of the charges of `paper` on 197 tokens, or their sum over a block.", tensor),
    "backrazor": Rule(
        "Back Razor's released estimator, from which `paper` was derived: the input of q, k and v is charged "
        "three times, the FFN carries a residual, and every block counts as on the gradient path. With pruning, "
        "each value costs a bit and each remaining one 2 bytes more (4 in the norms), a GELU input 2 bytes.",
        lambda setting, **given: backrazor_rule.memory(shape(setting), **given).total_mb,
    ),
    "macs": Rule(
        "Multiply-adds of the forward pass, in 1e9, times the batch: linear layers, patch embedding, "
        "attention products, router and experts. Nothing of the backward pass.",
        lambda setting, batch=1: giga(batch * bsr_rule.forward_macs(shape(setting))),
    ),
    "thop": Rule(
        "The count of the thop library: torch's own linear layers and convolutions, and four times the "
        "elements that enter norms. Attention products, router and experts count as zero.",
        lambda setting, batch: giga(batch * bsr_rule.thop_count(shape(setting))),
    ),
    "memory ratio": Rule("`paper` of full fine-tuning over `paper` of the setting.", memory_ratio),
    "on-device model": Rule(
        "No rule produced these figures: they were measured on a GPU. Ours is a lower bound for orientation: "
        "batch x what autograd keeps in plain PyTorch + 4 bytes for each parameter and 8 more for each "
        "trainable one (gradient and momentum). Temporary buffers come on top.",
        on_device,
    ),
    "paper, ResNet-50": Rule(
        "`paper, activations` on torchvision's ResNet-50, in MB of 10^6 bytes: the inputs of trained layers, a bit for "
        "each value of a ReLU behind the first of them, and at the peak a convolution's input and output and the "
        "block's input. In the blocks that BSR trains, norms are frozen.",
        lambda setting, trained=None: resnet.activations(trained) / 1e6,
    ),
    "macs, ResNet-50": Rule(
        "`macs` of torchvision's ResNet-50, one image.", lambda setting: giga(resnet.forward_macs())
    ),
}


STEP_MEMORY = ("paper", "paper, activations", "backrazor", "on-device model")


@dataclass(frozen=True, slots=True)
class Figure:
    """A printed figure and how to recompute it.

    Attributes:
        published: the digits as printed.
        rule: a key of RULES, or None if there is nothing to compute it from.
        status: "reproduced" (`moe-bsr reproduce` fails if it is not), "corrected" (the correct value for the setting as
            described), "other rule" (the value by the rule of the neighboring rows), or "not reproduced".
    """

    table: str
    row: str
    column: str
    published: str
    rule: str | None
    setting: Setting | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    status: Literal["reproduced", "corrected", "other rule", "not reproduced"] = "reproduced"
    note: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """A recomputed figure.

    Attributes:
        ours: our value; None without a rule.
        relative_difference: (ours - published) / published.
        off: whether a figure with status "reproduced" differs by more than 0.3 % and by more than half a unit of its
            last digit.
        kept_mb: values of KEPT for its setting, if the figure is the memory of a training step; else empty.
    """

    table: str
    row: str
    column: str
    published: float
    ours: float | None
    rule: str | None
    relative_difference: float | None
    status: str
    off: bool
    note: str
    kept_mb: dict[str, float | None]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def rebuild(figure: Figure) -> Result:
    """Recompute a figure and compare it with the printed one."""
    published = float(figure.published)
    ours = difference = None
    off, kept = False, {}
    if figure.rule is not None:
        ours = RULES[figure.rule].rebuild(figure.setting, **figure.arguments)
        difference = (ours - published) / published
        half_digit = 0.5 * 10.0 ** -len(figure.published.partition(".")[2])
        off = figure.status == "reproduced" and abs(difference) > TOLERANCE and abs(ours - published) > half_digit
    if figure.rule in STEP_MEMORY:
        kept = {who: of(figure.setting) for who, of in KEPT.items()}
    return Result(
        figure.table,
        figure.row,
        figure.column,
        published,
        ours,
        figure.rule,
        difference,
        figure.status,
        off,
        figure.note,
        kept,
    )
