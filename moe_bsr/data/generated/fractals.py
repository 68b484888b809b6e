"""Draw fractals: figures made of smaller copies of themselves, as clouds of points, and Julia sets.

Each figure is a function of the random generator, which varies its angles and proportions a little. It returns points
of the figure (complex), or the mask itself for a Julia set.
"""

import numpy as np

from moe_bsr.data.generated.drawing import TAU, Pose, corners, dust, paint


def _copies(points, scales, shifts, depth):
    """Replace `points` by their images under all maps z -> scale * z + shift together, `depth` times."""
    scales, shifts = np.asarray(scales)[:, None], np.asarray(shifts)[:, None]
    for _ in range(depth):
        points = (scales * points + shifts).ravel()
    return points


def _about(centers, scale, depth, twist=0):
    """Return the points of a figure made of copies of itself at the given centers, with equal scale and twist."""
    return _copies(np.zeros(1), np.full(len(centers), scale * np.exp(1j * twist)), centers, depth)


def _path(scales, shifts, depth):
    """Return the points of a line from 0 to 1 that is repeatedly replaced by smaller lines."""
    return _copies(np.linspace(0, 1, 4), scales, shifts, depth)


def _half(angle):
    """Return the middle of the line from 0 to 1, moved aside so that the first half is tilted by `angle`."""
    return 0.5 / np.cos(angle) * np.exp(1j * angle)


def _dragon(rng):
    half = _half(rng.uniform(0.74, 0.8))
    return 1.4 * (_path([half, half - 1], [0, 1], 10) - 0.45)


def _levy(rng):
    half = _half(rng.uniform(0.7, 0.8))
    return 1.1 * (_path([half, np.conj(half)], [0, half], 10) - 0.5 - 0.2j)


def _snowflake(rng):
    tip = rng.uniform(0.24, 0.32) * 1j
    knots = np.array([0, 1 / 3, 0.5 + tip, 2 / 3, 1])
    side = _path(np.diff(knots), knots[:-1], 4) - 0.5 + 0.29j
    return np.concatenate([side * np.exp(1j * TAU * k / 3) for k in range(3)]) * 1.5


def _tree(rng):
    arms = rng.uniform(0.62, 0.72, 2) * np.exp(1j * np.array([1, -1]) * rng.uniform(0.35, 0.65, 2))
    trunk = np.linspace(0, 1, 12)
    levels = [trunk]
    for _ in range(8):
        levels.append((arms[:, None] * levels[-1] + 1).ravel())
    return 0.75 * (np.concatenate(levels) - 1.3)


def _fern(rng):
    bend, spread = rng.uniform(-0.6, 0.6), rng.uniform(0.8, 1.2)
    t = np.linspace(0, 1, 24)
    leaf = t
    for nodes in (9, 12):
        at = np.linspace(0.12, 0.95, nodes)
        reach = 0.42 * (1 - at) ** 0.8 + 0.03
        sides = [(at + reach * np.exp(s * 1j * spread) * (leaf[:, None])).ravel() for s in (1, -1)]
        leaf = np.concatenate([t, *sides])
    return (leaf * np.exp(1j * bend * leaf.real) - 0.5) * 1.9


def _julia(center, reach):
    """Return a figure: the mask of points whose orbits under z -> z^2 + c stay small, for random c near `center`."""

    def escape(rng):
        c = np.complex64(center + reach * complex(*rng.normal(0, 1, 2)))
        z = Pose(rng, size=(0.25, 0.5), shift=0.35, stretch=1.7).field() * np.complex64(0.95)
        stay = np.zeros(z.shape, np.float32)
        for _ in range(18):
            z = z * z + c
            size = z.real**2 + z.imag**2
            stay += size < 9
            z[size > 100] = 10  # has escaped; this avoids an overflow
        return np.clip((stay - 3) / 15, 0, 1) ** 1.5

    return escape


_ring = np.exp(1j * TAU * (np.arange(6) / 6))
_square = np.array([x + 1j * y for x in (-1, 0, 1) for y in (-1, 0, 1)])
FRACTALS = {
    "gasket": lambda rng: _about(0.5 * corners([1.1] * 3), 0.5, 7),
    "carpet": lambda rng: _about(_square[_square != 0] * 0.55, 1 / 3, 4),
    "plus": lambda rng: _about(np.array([0, 1, 1j, -1, -1j]) * 0.68, 1 / 3, 5),
    "hexaflake": lambda rng: _about(np.append(_ring * 0.68, 0), 1 / 3, 4),
    "dust": lambda rng: _about(corners([0.85] * 4, 0.125) * 0.72, rng.uniform(0.32, 0.4), 5, rng.uniform(-0.2, 0.2)),
    "snowflake": _snowflake,
    "dragon": _dragon,
    "levy": _levy,
    "tree": _tree,
    "fern": _fern,
    "rabbit": _julia(-0.123 + 0.745j, 0.01),
    "lightning": _julia(-0.02 + 0.98j, 0.012),
}


def draw_fractal(label, rng):
    figure = list(FRACTALS.values())[label](rng)
    if np.iscomplexobj(figure):
        pose = Pose(rng, size=(0.3, 0.7), shift=0.35, stretch=1.7)
        figure = dust(pose.place(figure), gain=rng.uniform(0.8, 1.6))
    return paint(rng, figure, clutter=14)
