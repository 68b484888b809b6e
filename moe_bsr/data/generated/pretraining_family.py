"""Draw the images that the bundled backbone is pretrained on: 240 classes, none of which is a class of a task.

The figure of each class is random, with the number of the class as its seed. Each image shows it in a new pose and new
paint:

* doodles: one to three free curves through random knots (the task glyphs has three or four strokes on a lattice);
* blots: closed outlines with random bumps or corners (none is a named shape of the task shapes);
* patterns: two or three waves crossing at random angles, two spirals across each other, or filtered noise with a random
  grain (the task textures has plain stripes, checks, rings, bricks and so on);
* rosettes: figures of 2 to 9 equal parts with a random, slanting rim (the task petals has mirror-symmetric forms; it
  shares numbers of parts with these, but no rim);
* growths: random sets of two to four maps, applied again and again (the task fractals has the classic ones, none of
  which is among these);
* groups: two to five equal random blots in a row, an arc, a stack, a spiral or scattered (none of the five tasks is
  about counting).

So a backbone can transfer strokes, edges, periodicity, symmetry and recursion, but no class. Colors, background,
clutter, light and noise are drawn as in the tasks.
"""

from functools import cache

import numpy as np

from moe_bsr.data.generated.drawing import (
    TAU,
    Pose,
    curve,
    dust,
    finish,
    paint,
    polygons,
    ramp,
    smooth_noise,
    strokes,
    two_colors,
)

GROUPS = {"doodle": 60, "blot": 40, "pattern": 50, "rosette": 40, "growth": 30, "group": 20}


def _class_rng(kind, number):
    return np.random.default_rng((list(GROUPS).index(kind), number, 77))


@cache
def _doodle(number):
    rng = _class_rng("doodle", number)
    lines = []
    for knots in ((6,), (8,), (5, 4), (4, 4, 3))[number % 4]:
        start = rng.uniform(0, TAU)
        bends = rng.uniform(0.3, 2.2, knots) * rng.choice([-1, 1], knots, p=[0.3, 0.7])
        steps = rng.uniform(0.4, 0.9, knots) * np.exp(1j * (start + np.cumsum(bends)))
        lines.append(np.cumsum(steps) + complex(*rng.uniform(-0.5, 0.5, 2)))
    points = np.concatenate(lines)
    x, y = points.real, points.imag
    center = (x.max() + x.min() + 1j * (y.max() + y.min())) / 2
    reach = np.abs(points - center).max()
    return [(line - center) / reach for line in lines]


def draw_doodle(number, rng):
    pose = Pose(rng, size=(0.55, 0.9), turn=0.4, shift=0.2, stretch=1.35)
    lines = []
    for line in _doodle(number):
        wobble = rng.normal(0, 0.04, (2, len(line)))
        lines.append(pose.place(curve(line + wobble[0] + 1j * wobble[1])))
    return paint(rng, strokes(lines, rng.uniform(1.5, 4)), clutter=5)


def _rim(rng, orders, strength, angle):
    """Return the radius at `angle` of a random closed outline: a circle plus waves of the given orders."""
    sizes = strength * rng.uniform(0.5, 1, len(orders)) / np.sqrt(len(orders))
    phases = rng.uniform(0, TAU, len(orders))
    waves = zip(orders, sizes, phases, strict=True)
    return 0.7 + sum(size * np.cos(order * angle + phase) for order, size, phase in waves)


@cache
def _blot(number):
    rng = _class_rng("blot", number)
    corners = number % 2 == 1
    count = rng.integers(6, 10) if corners else 48
    angle = TAU * (np.arange(count) + rng.uniform(-0.3, 0.3, count) * corners) / count
    orders = rng.choice(np.arange(2, 7), 3, replace=False)
    return 1.2 * _rim(rng, orders, 0.45, angle) * np.exp(1j * angle)


def draw_blot(number, rng):
    pose = Pose(rng, size=(0.4, 0.85), shift=0.3, stretch=1.4)
    outline = _blot(number)
    style = rng.integers(0, 3)
    holes = [pose.place(outline * rng.uniform(0.5, 0.75))] if style == 1 else []
    mask = polygons([pose.place(outline)], holes)
    if style == 2:
        mask = mask * (0.3 + 0.7 * np.clip(smooth_noise(rng, 12) * 2 - 0.5, 0, 1))
    return paint(rng, mask, clutter=10)


def _squash(value, kind):
    """Apply one of three wave shapes to values in about -1..1: soft, hard-edged or ridged."""
    if kind == 0:
        return 0.5 + 0.5 * value
    return np.clip(0.5 + 4 * value, 0, 1) if kind == 1 else 1 - np.minimum(np.abs(value) * 1.6, 1)


def _crossing(number, z):
    rng = _class_rng("pattern", number)
    count = 2 + number % 2
    angles = rng.uniform(0, TAU) + np.cumsum(rng.uniform(0.5, 1.2, count))
    product = rng.random() < 0.4
    pitches, sways = rng.uniform(0.5, 1.6, count), rng.uniform(0, 0.5, count)
    waves = []
    for angle, pitch, sway in zip(angles, pitches, sways, strict=True):
        turned = z * np.exp(-1j * angle)
        waves.append(np.sin(TAU * turned.real * pitch + 3 * sway * np.sin(np.pi * turned.imag)))
    value = np.prod(waves, 0) * 1.5 ** (count - 1) if product else np.sum(waves, 0) / count**0.5
    return _squash(value, number // 2 % 3)


def _around(number, z):
    rng = _class_rng("pattern", number)
    radius, angle = np.log(np.abs(z) + 0.3), np.angle(z)
    arms = rng.integers(3, 9, 2)
    pitches = rng.uniform(4, 9, 2)
    one_way = np.sin(pitches[0] * radius + arms[0] * angle)
    other_way = np.sin(pitches[1] * radius - arms[1] * angle)
    return _squash((one_way + other_way) / 1.4, number % 3)


@cache
def _grain(number):
    rng = _class_rng("pattern", number)
    return *(rng.uniform(*span) for span in ((0.06, 0.22), (0.15, 1.2), (1, 3.5))), rng.integers(3)


def _filtered(number, rng):
    """Return noise with a ring-shaped spectrum, whose middle frequency, width and anisotropy depend on the class."""
    middle, width, longish, shape = _grain(number)
    middle = middle * rng.uniform(0.85, 1.2)
    turn = np.exp(1j * rng.uniform(0, TAU))
    frequency = (np.fft.rfftfreq(64)[None, :] + 1j * np.fft.fftfreq(64)[:, None]) * turn
    size = np.hypot(frequency.real, longish * frequency.imag) + 1e-4
    spectrum = np.exp(-((np.log(size / middle) / width) ** 2)) / size
    value = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((64, 64))) * spectrum, (64, 64))
    return _squash(value / value.std() * 0.7, shape)


def draw_pattern(number, rng):
    z = Pose(rng, size=(0.2, 0.45), shift=0.5, stretch=1.25).field()
    if number < 30:
        value = _crossing(number, z)
    else:
        value = _around(number, z / 1.5) if number < 40 else _filtered(number, rng)
    if rng.random() < 0.5:
        value = 1 - value
    first, second = two_colors(rng)
    value = (np.clip(value, 0, 1) * rng.uniform(0.5, 1))[..., None].astype(np.float32)
    return finish(rng, first + value * (second - first) + ramp(rng, 0.2)[..., None])


def draw_rosette(number, rng):
    fixed = _class_rng("rosette", number)
    parts = 2 + number % 8
    pose = Pose(rng, size=(0.5, 0.85), shift=0.22, stretch=1.6)
    z = pose.field()
    angle, radius = np.angle(z), np.abs(z)
    angle = angle + fixed.uniform(-1.2, 1.2) * radius
    rim = _rim(fixed, parts * np.array([1, 2, 3]), 0.4, angle)
    heart = fixed.uniform(0.3, 0.7) * _rim(fixed, parts * np.array([1, 2]), 0.4, angle)
    inner = pose.soft((heart - radius) * 0.7) * (number // 8 % 2)  # classes 8 to 15 and 24 to 31 have a heart
    return paint(rng, pose.soft((rim - radius) * 0.7), inner, clutter=8)


@cache
def _maps(number):
    rng = _class_rng("growth", number)
    count = 2 + number % 3
    size = rng.uniform(0.75, 1, count) * (0.74, 0.6, 0.52)[count - 2]
    scales = size * np.exp(1j * rng.uniform(-np.pi, np.pi, count))
    bearing = TAU * np.arange(count) / count + rng.uniform(-0.4, 0.4, count)
    return scales, rng.uniform(0.4, 0.8, count) * np.exp(1j * bearing), rng.random(count) < 0.3


def draw_growth(number, rng):
    scales, shifts, mirrored = _maps(number)
    scales = scales * np.exp(1j * rng.normal(0, 0.05, len(scales))) * rng.uniform(0.95, 1.05)
    points = np.linspace(-0.3, 0.3, 3).astype(complex)
    for _ in range((10, 7, 5)[len(scales) - 2]):
        parts = [
            a * (points.conj() if flip else points) + b for a, b, flip in zip(scales, shifts, mirrored, strict=True)
        ]
        points = np.concatenate(parts)
    points = (points - points.mean()) / (np.abs(points - points.mean()).max() + 1e-6)
    pose = Pose(rng, size=(0.6, 0.95), shift=0.2, stretch=1.3)
    return paint(rng, dust(pose.place(points), gain=rng.uniform(1, 1.6)), clutter=6)


def _scattered(rng, count):
    reach = 0.75 * np.sqrt(rng.random(count))
    return reach * np.exp(1j * (TAU * np.arange(count) / count + rng.uniform(-0.4, 0.4, count)))


def draw_group(number, rng):
    count, layout = 2 + number % 4, number // 4
    t = np.arange(count) - (count - 1) / 2
    spots = (
        t * 0.5,
        0.8 * np.exp(1j * t * 0.9) - 0.4,
        t * 0.42j + 0.25 * (-1) ** np.arange(count),
        (0.3 + 0.16 * np.arange(count)) * np.exp(1.7j * np.arange(count)),
        _scattered(rng, count),
    )[layout]
    size = (0.32, 0.42, 0.32, 0.32, 0.35)[layout]
    angle = np.linspace(0, TAU, 24, endpoint=False)
    rim = _rim(rng, rng.integers(2, 6, 2), 0.4, angle)
    element = rim * np.exp(1j * (angle + rng.uniform(0, TAU)))
    pose = Pose(rng, size=(0.6, 0.9), shift=0.15, stretch=1.3)
    return paint(rng, polygons([pose.place(spot + size * element) for spot in spots]), clutter=3)


_DRAW = {
    "doodle": draw_doodle,
    "blot": draw_blot,
    "pattern": draw_pattern,
    "rosette": draw_rosette,
    "growth": draw_growth,
    "group": draw_group,
}
_CLASSES = [(kind, number) for kind, size in GROUPS.items() for number in range(size)]


def draw_source(label, rng):
    kind, number = _CLASSES[label]
    return _DRAW[kind](number, rng)


SOURCE_FAMILY = ([f"{kind} {number}" for kind, number in _CLASSES], draw_source)
