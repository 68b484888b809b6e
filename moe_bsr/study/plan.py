"""Read a sweep file, which lists the arms of a comparison, their changes, and what they have in common.

config: conflict_scene.yaml        # a configuration, packaged or a path
set: [data.views=1]                # for every arm
updates: 150                       # per task, in every arm
seeds: [0, 1, 2]
baseline: shared
arms:
  shared: {set: [plan.moe_blocks=[]]}
  apart: {set: [plan.moe_blocks=[], mode=single_task]}
  gated: {set: [moe.gate=task], title: low-rank experts, divided among the tasks}
"""

from dataclasses import dataclass, field
from pathlib import Path

from moe_bsr import config as configuration
from moe_bsr.config import Config, ConfigError, packaged, require
from moe_bsr.config.reader import convert, read_tree


@dataclass(frozen=True, slots=True)
class Arm:
    """One of the configurations that are compared.

    Attributes:
        set: `key=value` overrides, as on the command line. config: replaces the sweep's. title: for the table.
    """

    set: list[str] = field(default_factory=list)
    config: str | None = None
    title: str = ""


@dataclass(frozen=True, slots=True)
class Tuning:
    """Values of one key that every arm tries in short runs first. It then uses the best one on validation.

    Attributes:
        updates: per task. seed: for these runs; must not be one of the sweep's seeds.
    """

    key: str
    values: list[float]
    updates: int
    seed: int = 100

    def __post_init__(self) -> None:
        require(len(self.values) > 0, "tune.values", self.values, "at least one value")


@dataclass(frozen=True, slots=True)
class Sweep:
    """Content of a sweep file.

    Attributes:
        updates: per task, so that all arms see the same number of images.
        baseline: the arm with which the others are compared; None: the first one.
        split: the split that is scored: `val`, or `test` once per run.
    """

    arms: dict[str, Arm]
    updates: int
    config: str | None = None
    set: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    baseline: str | None = None
    split: str = "val"
    tune: Tuning | None = None

    def __post_init__(self) -> None:
        require(len(self.arms) > 0, "arms", self.arms, "at least one arm")
        require(self.updates >= 1, "updates", self.updates, "at least 1")
        require(len(set(self.seeds)) == len(self.seeds) > 0, "seeds", self.seeds, "at least one, all different")
        require(self.split in ("val", "test"), "split", self.split, "val or test")
        named = self.baseline is None or self.baseline in self.arms
        require(named, "baseline", self.baseline, f"one of {', '.join(self.arms)}")
        if self.tune is not None:
            apart = self.tune.seed not in self.seeds
            require(apart, "tune.seed", self.tune.seed, "not one of the seeds, so that no scored run is used to tune")
            for name, arm in self.arms.items():  # an arm's `set` would override the values that are tried
                fixed = any(each.split("=")[0].strip() == self.tune.key for each in arm.set)
                require(not fixed, f"arms.{name}.set", arm.set, f"without {self.tune.key}, which tune.key tries")

    def against(self) -> str:
        """Return the name of the arm with which the others are compared."""
        return self.baseline or next(iter(self.arms))


def read(path: str | Path) -> Sweep:
    """Read a sweep file, given by its path or by the name of a packaged one.

    Raises:
        ConfigError: there is no such file, or it has an unknown key or an impossible value.
    """
    path = Path(path)
    return convert(read_tree(path if path.is_file() else packaged.find("configs/sweeps", path) or path), Sweep, "")


def config_of(sweep: Sweep, arm: str, seed: int, overrides: list[str], updates: int | None = None) -> Config:
    """Return the configuration of one run.

    Args:
        overrides: from the command line. They take precedence over the sweep's `set`, and an arm's `set` over them.
        updates: per task; None: those of the sweep.

    Raises:
        ConfigError: neither the sweep nor the arm names a configuration, or the configuration is impossible.
    """
    about = sweep.arms[arm]
    file = about.config or sweep.config
    if file is None:
        raise ConfigError(f"arms.{arm}: no configuration; name one, or one for all arms, as config: FILE")
    fixed = [
        "train.eval_every=null",
        "train.pictures=false",
        f"train.evaluate_test={str(sweep.split == 'test').lower()}",
    ]
    config = configuration.load(file, [*fixed, *sweep.set, *overrides, *about.set, f"seed={seed}"])
    times = 1 if config.mode == "single_task" else len(config.task_names())
    return configuration.replace(config, train__steps=times * (updates or sweep.updates))
