"""Two suites of drawn tasks with different labels for the same images, to study whether tasks disturb each other.

    factor_*   one to four figures with the same outline, surface, hue and rotation. The five tasks need all five
               factors in one class token, and classifiers usually learn to ignore rotation and hue.
    scene_*    a figure in front of a patterned background. One task needs the patches that the other should drop.

The factors of an image are independent of each other, and the classes of each factor are balanced.
"""

import colorsys
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np

from moe_bsr.data.generated.drawing import TAU, Pose, backdrop, finish, polygons, ramp
from moe_bsr.data.generated.task_families import SHAPES, TEXTURES

Labels = dict[str, int]  # the labels of an image, by factor

# Outlines without rotational symmetry, so that their rotation can be recognized.
OUTLINES = {name: SHAPES[name] for name in ("heart", "crescent", "arrow", "drop")} | {
    "wedge": np.array([1.2, -0.9 + 0.55j, -0.9 - 0.55j]),
    "half disc": np.append(np.exp(1j * np.linspace(-TAU / 4, TAU / 4, 20)), 0) * 1.1 - 0.45,
    "house": np.array([1.1, 0.3 + 0.75j, -0.9 + 0.75j, -0.9 - 0.75j, 0.3 - 0.75j]),
    "corner": np.array([-0.9 - 0.9j, 1 - 0.9j, 1 - 0.2j, -0.2 - 0.2j, -0.2 + 1j, -0.9 + 1j]),
}
SURFACES = ("stripes", "checks", "dots", "bricks", "zigzag", "rings", "rays", "honeycomb", "scales", "weave")
HUES = ("red", "orange", "lime", "green", "cyan", "blue", "violet", "pink")
TURNS = 8


def _surface(name: str, rng) -> np.ndarray:
    """Return a pattern over the whole canvas, float32 (64, 64) in 0..1."""
    draw: Callable[[np.ndarray], np.ndarray] = TEXTURES[name]  # type: ignore[assignment]  # `SURFACES` take no rng
    value = draw(Pose(rng, size=(0.14, 0.22), shift=0.6, stretch=1.2).field())
    return np.asarray(value if rng.random() < 0.5 else 1 - value, np.float32)


def _draw_factors(labels: Labels, rng) -> np.ndarray:
    outline = list(OUTLINES.values())[labels["outline"]]
    turn = np.exp(1j * TAU * (labels["turn"] + rng.uniform(-0.2, 0.2)) / TURNS)
    places = rng.permutation([-0.48 - 0.48j, -0.48 + 0.48j, 0.48 - 0.48j, 0.48 + 0.48j])[: labels["count"] + 1]
    size = rng.uniform(0.32, 0.4)  # independent of their number, so that the size does not reveal the count
    mask = polygons([size * turn * outline + place + complex(*rng.uniform(-0.06, 0.06, 2)) for place in places])
    hue = (labels["hue"] + rng.uniform(-0.25, 0.25)) / len(HUES)
    bright, dark = (np.array(colorsys.hsv_to_rgb(hue, 0.9, v), np.float32) for v in (0.95, 0.3))
    pattern = _surface(SURFACES[labels["surface"]], rng)[..., None]
    gray = rng.uniform(0.45, 0.75)
    image = backdrop(rng, np.full(3, gray, np.float32), clutter=0)
    image += mask[..., None] * (dark + pattern * (bright - dark) - image)
    return finish(rng, image)


def _draw_scene(labels: Labels, rng) -> np.ndarray:
    pattern = _surface(SURFACES[labels["ground"]], rng)[..., None]
    first, second = rng.random((2, 3), np.float32) * 0.45 + rng.choice([0.0, 0.55])
    image = first + 0.9 * pattern * (second - first) + ramp(rng, 0.1)[..., None] + 0.25 * (pattern - 0.5)
    pose = Pose(rng, size=(0.3, 0.45), shift=0.4, stretch=1.3)
    mask = polygons([pose.place(list(SHAPES.values())[labels["figure"]])])[..., None]
    color = rng.random(3, np.float32) * 0.4 + (0.6 if first.mean() < 0.5 else 0.0)
    return finish(rng, image + mask * (color - image))


# suite -> (factor -> class names, function that draws an image with given labels)
SUITES: dict[str, tuple[dict[str, list[str]], Callable[[Labels, np.random.Generator], np.ndarray]]] = {
    "factor": (
        {
            "outline": list(OUTLINES),
            "surface": list(SURFACES),
            "hue": list(HUES),
            "count": ["one", "two", "three", "four"],
            "turn": [f"{360 * turn // TURNS} degrees" for turn in range(TURNS)],
        },
        _draw_factors,
    ),
    "scene": ({"figure": list(SHAPES), "ground": list(SURFACES)}, _draw_scene),
}
SUITE_FAMILIES = {f"{suite}_{factor}": (suite, factor) for suite, (factors, _) in SUITES.items() for factor in factors}


@cache
def order(suite: str, factor: str, stream: tuple[int, int], round_: int) -> np.ndarray:
    """Return a permutation of a factor's classes: its labels in one round. A round has as many images as classes."""
    count = len(SUITES[suite][0][factor])
    return np.random.default_rng((*stream, zlib.crc32(factor.encode()), round_)).permutation(count)


def label(suite: str, factor: str, stream: tuple[int, int], index: int) -> int:
    """Return the label of image `index`. `stream` stands for split and seed; all tasks of a suite share it."""
    round_, place = divmod(index, len(SUITES[suite][0][factor]))
    return int(order(suite, factor, stream, round_)[place])


def image(suite: str, stream: tuple[int, int], index: int) -> np.ndarray:
    """Draw image `index` of a suite, uint8 (64, 64, 3). All tasks of the suite share it."""
    factors, draw = SUITES[suite]
    labels = {factor: label(suite, factor, stream, index) for factor in factors}
    return draw(labels, np.random.default_rng((*stream, index)))
