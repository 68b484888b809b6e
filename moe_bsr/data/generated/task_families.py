"""Draw the five generated tasks: shapes, textures, glyphs, petals and fractals.

Each family is a list of class names and a function `draw(label, rng)` that returns one image, uint8 (64, 64, 3).
Position, size, rotation, colors, background and light are random. Only the structure of the figure depends on the
class.
"""

from functools import cache

import numpy as np

from moe_bsr.data.generated.drawing import (
    CANVAS,
    TAU,
    Pose,
    backdrop,
    corners,
    curve,
    finish,
    paint,
    polygons,
    smooth_noise,
    strokes,
    two_colors,
)
from moe_bsr.data.generated.fractals import FRACTALS, draw_fractal

# ---- shapes: one flat figure, solid, outlined or hatched, with clutter ---------------------------


_round = np.exp(1j * np.linspace(0, TAU, 40, endpoint=False))
_bow = np.linspace(-2.2, 2.2, 24)
_t = np.linspace(0, TAU, 40, endpoint=False)
SHAPES = {
    "disc": _round,
    "triangle": corners([1.1] * 3),
    "square": corners([1.1] * 4, 0.125),
    "pentagon": corners([1.05] * 5),
    "star": corners([1.15, 0.45] * 5),
    "cross": np.outer(1j ** np.arange(4), [1 - 0.32j, 1 + 0.32j, 0.32 + 0.32j]).ravel(),
    "heart": 1.06 * np.sin(_t) ** 3 + 0.066j * np.cos(np.outer(_t, [1, 2, 3, 4])) @ [13, -5, -2, -1],
    "crescent": np.concatenate((np.exp(1j * _bow), 0.35 + 0.98 * np.exp(-0.955j * _bow))),
    "arrow": np.array([1.1, 0.2 + 0.8j, 0.2 + 0.3j, -1 + 0.3j, -1 - 0.3j, 0.2 - 0.3j, 0.2 - 0.8j]),
    "drop": np.concatenate((0.75 * np.exp(1j * np.linspace(0.45, TAU - 0.45, 30)) - 0.3, [1.25])),
}


def draw_shape(label, rng):
    pose = Pose(rng, size=(0.45, 0.8), shift=0.25, stretch=1.3)
    outline = list(SHAPES.values())[label]
    style = rng.integers(0, 4)  # outlined, hatched, or else solid
    hole = pose.place(outline * rng.uniform(0.5, 0.75))
    mask = polygons([pose.place(outline)], [hole] if style == 1 else [])
    if style == 2:
        bars = np.sin((CANVAS * np.exp(1j * rng.uniform(0, TAU))).real * rng.uniform(12, 30))
        mask = mask * np.clip(0.7 + 1.2 * bars, 0.4, 1)
    return paint(rng, mask, clutter=6)


# ---- textures: a pattern that fills the image ----------------------------------------------------


def _wave(x):
    return 0.5 + 0.5 * np.sin(TAU * x)


def _saw(x):
    return np.abs(2 * (x - np.floor(x)) - 1)


def _edge(x, level=0.5):
    return np.clip((x - level) * 6 + 0.5, 0, 1)


def _bricks(z):
    row = np.floor(z.imag)
    return np.minimum(_edge(_saw(z.imag), 0.25), _edge(_saw(z.real / 2 + row / 2), 0.14))


def _honeycomb(z):
    a, b, c = (np.cos(TAU * (z * np.exp(1j * TAU * k / 3)).real * 0.8) for k in range(3))
    return _edge(a + b + c, -0.6)


def _scales(z):
    row = np.floor(z.imag)
    x = z.real + row / 2
    x = x - np.floor(x) - 0.5
    y = z.imag - row
    return np.clip(2.2 * np.abs(x**2 * 4 + y**2 - 0.9), 0, 1)


def _weave(z):
    over = (np.floor(z.real) + np.floor(z.imag)) % 2 == 0
    return np.where(over, _edge(_saw(z.imag), 0.75) * 0.6 + 0.4, _edge(_saw(z.real), 0.75) * 0.6)


def _mosaic(z, rng):
    seeds = rng.uniform(-1, 1, (28, 2)) @ [1, 1j]
    nearest = np.abs(CANVAS[..., None] - seeds.astype(np.complex64)).argmin(-1)
    return rng.random(28, np.float32)[nearest]


def _straw(z, rng):
    count, angle = rng.integers(40, 90), rng.uniform(0, TAU)
    middle = rng.uniform(-1.1, 1.1, (count, 2)) @ [1, 1j]
    half = 0.16 * np.exp(1j * (angle + rng.normal(0, 0.35, count)))
    return strokes(np.stack((middle - half, middle + half), 1), rng.uniform(1, 2))


def _confetti(z, rng):
    middle = rng.uniform(-1.1, 1.1, (rng.integers(25, 60), 2)) @ [1, 1j]
    angle = np.exp(1j * rng.uniform(0, TAU, len(middle)))
    square = rng.uniform(0.06, 0.11) * np.array([1, 1j, -1, -1j])
    return polygons(middle[:, None] + angle[:, None] * square)


def _clouds(z, rng):
    return sum(smooth_noise(rng, 2 ** (k + 2)) / 2**k for k in range(4)) / 1.9


def _marble(z, rng):
    return _wave(0.5 * z.real + rng.uniform(1.2, 2.2) * smooth_noise(rng, 4)) ** 2


# A texture is a function of the point under each pixel, with about one unit per period. The last five also take the
# random generator.
TEXTURES = {
    "stripes": lambda z: _wave(z.real),
    "ruling": lambda z: _edge(_saw(z.real * 0.6), 0.82),
    "checks": lambda z: _edge(0.5 + 2 * np.sin(np.pi * z.real) * np.sin(np.pi * z.imag)),
    "gingham": lambda z: (_edge(_wave(z.real)) + _edge(_wave(z.imag))) / 2,
    "dots": lambda z: _edge(_wave(z.real) * _wave(z.imag), 0.4),
    "mesh": lambda z: np.maximum(_edge(_saw(z.real * 0.7), 0.8), _edge(_saw(z.imag * 0.7), 0.8)),
    "bricks": _bricks,
    "zigzag": lambda z: _edge(_wave(z.real + 0.8 * _saw(z.imag * 0.6))),
    "ripples": lambda z: _wave(z.real + 0.35 * np.sin(TAU * z.imag * 0.45)),
    "rings": lambda z: _wave(np.abs(z)),
    "rays": lambda z: _edge(_wave(np.angle(z) * 12 / TAU)),
    "spiral": lambda z: _wave(np.abs(z) * 0.8 + 2 * np.angle(z) / TAU),
    "honeycomb": _honeycomb,
    "scales": _scales,
    "weave": _weave,
    "mosaic": _mosaic,
    "straw": _straw,
    "confetti": _confetti,
    "clouds": _clouds,
    "marble": _marble,
}
_OWN = list(TEXTURES).index("mosaic")


def draw_texture(label, rng):
    surface = list(TEXTURES.values())[label]
    pose = Pose(rng, size=(0.14, 0.5), shift=0.6, stretch=1.6)
    swell = smooth_noise(rng, 2) + 1j * smooth_noise(rng, 2)  # the surface is not quite flat
    z = pose.field() + (rng.uniform(0, 0.25) / pose.scale * swell).astype(np.complex64)
    value = surface(z) if label < _OWN else surface(z, rng)
    if rng.random() < 0.5:
        value = 1 - value
    value = (value * rng.uniform(0.2, 0.8))[..., None].astype(np.float32)
    first, second = two_colors(rng)
    ground = backdrop(rng, first, clutter=12)
    return finish(rng, ground + value * (second - ground))


# ---- glyphs: the signs of an invented script, handwritten ----------------------------------------

SYLLABLES = [c + v for c in "ptkmnsrl" for v in "aeiou"]


@cache
def alphabet():
    """Return a list of strokes for each sign. Their knots lie on a 3 x 4 lattice, and no two signs look alike."""
    rng = np.random.default_rng(20)
    lattice = (np.array([-0.6, 0, 0.6])[:, None] + 1j * np.array([-0.9, -0.3, 0.3, 0.9])).ravel()
    signs: list[list[np.ndarray]] = []
    looks: list[np.ndarray] = []
    while len(signs) < len(SYLLABLES):
        lines = []
        for _ in range(rng.integers(3, 5)):
            start, end = rng.choice(lattice, 2, replace=False)
            while abs(end - start) > 1.4:
                start, end = rng.choice(lattice, 2, replace=False)
            bulge = rng.choice([0, 0, 0.45, -0.45]) * 1j * (end - start)
            lines.append(np.array([start, (start + end) / 2 + bulge, end]))
        look = strokes([0.8 * curve(line) for line in lines], 6).ravel()
        look /= np.linalg.norm(look)
        spread = np.concatenate(lines)
        wide = np.ptp(spread.real) > 0.9 and np.ptp(spread.imag) > 1.1
        if wide and all(look @ other < 0.62 for other in looks):
            signs.append(lines)
            looks.append(look)
    return signs


def draw_glyph(label, rng):
    pose = Pose(rng, size=(0.5, 0.85), turn=0.3, shift=0.2, stretch=1.35)
    lines = []
    for line in alphabet()[label]:
        wobble = rng.normal(0, 0.05, (2, 3))
        lines.append(pose.place(curve(line + wobble[0] + 1j * wobble[1])))
    mask = strokes(lines, rng.uniform(1.5, 4))
    if rng.random() < 0.4:  # ruled paper
        level = rng.uniform(4, 7) * CANVAS.imag + rng.uniform(0, 1)
        mask = np.maximum(mask, 0.3 * _edge(_saw(level), 0.9))
    return paint(rng, mask, clutter=5)


# ---- petals: a flower seen at an angle; the class is the number and form of its petals -----------


def _bulge(u):
    return np.sqrt(np.maximum(1 - u**2, 0))


COUNTS = {"three": 3, "four": 4, "five": 5, "eight": 8}
FORMS = {  # radius of the rim as a function of u: 0 on the axis of a petal, 1 between two petals
    "round": lambda u: 0.35 + 0.65 * _bulge(u),
    "pointed": lambda u: 0.3 + 0.7 * (1 - u) ** 1.2,
    "notched": lambda u: 0.35 + 0.65 * _bulge(u) - 0.3 * np.exp(-((u / 0.25) ** 2)),
    "slender": lambda u: 0.15 + 0.85 * np.clip(2.2 - 4.5 * u, 0, 1),
    "fringed": lambda u: (0.3 + 0.7 * _bulge(u)) * (0.88 + 0.12 * np.cos(u * 2.5 * TAU)),
    "double": lambda u: 0.35 + 0.65 * _bulge(u),
}
PETALS = [(count, form) for count in COUNTS for form in FORMS]


def draw_petals(label, rng):
    count, form = PETALS[label]
    pose = Pose(rng, size=(0.5, 0.85), shift=0.22, stretch=1.6)
    z = pose.field()
    radius, angle = np.abs(z), np.angle(z) * COUNTS[count] / TAU
    rim = FORMS[form](_saw(angle + 0.5))
    mask = pose.soft((rim - radius) * 0.7)
    inner = pose.soft(rng.uniform(0.14, 0.24) - radius)
    if form == "double":
        second = pose.soft((0.55 * FORMS[form](_saw(angle)) - radius) * 0.7)
        gap = pose.soft((0.66 * FORMS[form](_saw(angle)) - radius) * 0.7)
        mask = mask * (1 - 0.75 * (gap - second))
    veins = 1 - rng.uniform(0, 0.5) * _saw(angle * rng.integers(1, 4)) * radius
    return paint(rng, mask * np.clip(veins, 0, 1), inner, clutter=8)


TASK_FAMILIES = {
    "shapes": (list(SHAPES), draw_shape),
    "textures": (list(TEXTURES), draw_texture),
    "glyphs": (SYLLABLES, draw_glyph),
    "petals": ([f"{count} {form}" for count, form in PETALS], draw_petals),
    "fractals": (list(FRACTALS), draw_fractal),
}
