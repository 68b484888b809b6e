"""Estimate data-parallel scaling: bytes exchanged per update, and the share of time that is spent computing.

This is a model, not a measurement. As in `runtime/exchange.py`, an update first computes and then exchanges gradients,
without overlap. A ring all-reduce among n moves 2 (n - 1) / n of the bytes over the slowest link: first within each
machine, then between machines, which have one link each.
"""

from dataclasses import dataclass

from moe_bsr import config as configuration
from moe_bsr.config import Config, ConfigError
from moe_bsr.cost.predict import predict
from moe_bsr.model.multitask import MultitaskViT, build_on_meta

WITHIN = {"NVLink": 300e9, "PCIe 4": 12e9}  # bytes per second between the GPUs of a machine, after data sheets
OF_NOMINAL = 0.85  # usable share of a network's nominal rate
BETWEEN = {f"{rate} Gb/s": OF_NOMINAL * rate * 1e9 / 8 for rate in (1, 10, 25, 100, 400, 3200)}


@dataclass(frozen=True, slots=True)
class Way:
    """Estimate for one configuration on several processes.

    Attributes:
        overrides: changes to the given configuration, as on the command line.
        exchanged: bytes that each process contributes to the all-reduce of an update. experts: the experts' part.
        compute: seconds that a process needs for its share of an update.
        efficiency: by link, compute / (compute + exchange).
    """

    overrides: str
    exchanged: int
    experts: int
    compute: float
    efficiency: dict[str, float]


def ways(
    config: Config,
    classes: dict[str, int],
    *,
    processes: int,
    machines: int,
    precision: str,
    tflops: float,
    seconds: float | None = None,
) -> list[Way]:
    """Return the estimate for the configuration, then for variants that exchange less, by decreasing bytes.

    Args:
        tflops: 10**12 operations per second of a process.
        seconds: measured time of a process for its share of an update of the configuration. It replaces `tflops`, and
            is scaled by the number of operations for the variants.
    """
    share = config.train.batch_size / processes
    found: list[Way] = []
    first = 0.0  # operations of the plan as it is configured
    for overrides in _variants(config):
        try:
            changed = configuration.replace(config, **overrides)
            model = build_on_meta(changed, classes)
        except ConfigError:
            continue  # an expert ratio that this backbone does not divide
        operations = predict(model, changed, batch=1, precision=precision, scratch=False).step_flops * share
        first = first or operations
        compute = operations / (tflops * 1e12) if seconds is None else seconds * operations / first
        sent, experts = exchanged(model, changed)
        links = {
            link: compute / (compute + exchange_seconds(sent, rate, processes, machines))
            for link, rate in (WITHIN if machines == 1 else BETWEEN).items()
        }
        found.append(Way(" ".join(configuration.as_overrides(overrides)), sent, experts, compute, links))
    return found[:1] + sorted(found[1:], key=lambda way: -way.exchanged)


def exchanged(model: MultitaskViT, config: Config) -> tuple[int, int]:
    """Return the bytes of an update's gradients in the exchanged dtype, mean over tasks, and the experts' part."""
    width = 2 if config.train.exchange == "bf16" else 4
    parts = model.mixtures()
    of_experts = {id(p) for part in parts for p in part.parameters()} - {
        id(p) for part in parts for p in part.router.parameters()
    }
    if config.sampler.kind == "joint":
        sets = [list(model.parameters())]
    else:
        sets = [model.parameters_of(task) for task in model.tasks]
    trained = [[p for p in each if p.requires_grad] for each in sets]
    total = sum(p.numel() for each in trained for p in each) // len(sets)
    experts = sum(p.numel() for p in trained[0] if id(p) in of_experts)
    return width * total, width * experts


def exchange_seconds(size: int, rate: float, processes: int, machines: int) -> float:
    """Return the time in seconds of the all-reduce of `size` bytes.

    Args:
        rate: bytes per second within the machine, or between machines if there are several.
    """
    local = processes // machines
    within = rate if machines == 1 else WITHIN["NVLink"]
    return 2 * size * ((local - 1) / local / within + (machines - 1) / machines / rate)


def _variants(config: Config) -> list[dict[str, object]]:
    """Return the overrides of all variants: none, then changes that reduce the exchange, alone and combined."""
    variants: list[dict[str, object]] = [{}]
    bf16: dict[str, object] = {} if config.train.exchange == "bf16" else {"train.exchange": "bf16"}
    if bf16:
        variants.append(bf16)
    if config.plan.moe_blocks and config.moe.experts != "low_rank":
        if config.moe.mlp_ratio > 1:
            variants += [{"moe.mlp_ratio": 1}, {"moe.mlp_ratio": 1} | bf16]
        variants += [{"moe.experts": "low_rank"}, {"moe.experts": "low_rank"} | bf16]
    return [variant for place, variant in enumerate(variants) if variant not in variants[:place]]


def table(found: list[Way], processes: int, machines: int, images: float) -> list[str]:
    """Return the estimates as lines of text.

    Args:
        images: images per process in an update.
    """
    own, links = found[0], list(found[0].efficiency)
    where = "one machine" if machines == 1 else f"{machines} machines"
    lines = [
        f"{processes} processes on {where}, {images:g} images per process and update, {own.compute * 1e3:.1f} ms of"
        " computation (estimate: exchange follows computation)",
        f"{'exchanged per update':<46}  {'10^6 B':>8}  {'experts':>8}  efficiency at "
        + ("links" if machines == 1 else "a machine's network")
        + " of",
        " " * 66 + "".join(f"{link:>11}" for link in links),
    ]
    for way in found:
        shown = "".join(f"{way.efficiency[link]:>10.0%} " for link in links)
        name = way.overrides or "as configured"
        lines.append(f"  {name:<44}  {way.exchanged / 1e6:>8.1f}  {way.experts / 1e6:>8.1f}{shown}".rstrip())
    share = own.experts / own.exchanged if own.exchanged else 0
    if share > 0.5:
        lines.append(f"{share:.0%} of it comes from experts, which saturate a network first")
    return lines
