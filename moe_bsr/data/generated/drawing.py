"""Tools to draw the generated images: poses, masks and paint, on a canvas of 64 x 64 pixels.

Points of a figure are complex numbers, roughly within the unit disc, with y upwards. A `Pose` places them on the
canvas, whose coordinates run from -1 to 1 as well. A mask is float32 (64, 64), 0 outside the figure and 1 inside, with
soft edges. `paint` turns a mask into an RGB image with random colors, background, clutter, light and noise. So only the
structure of the mask tells the class.
"""

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
FINE = 2 * SIZE  # strokes and polygons are drawn at twice the size and averaged, for soft edges

_axis = (np.arange(SIZE, dtype=np.float32) + 0.5) * (2 / SIZE) - 1
CANVAS = (_axis[None, :] - 1j * _axis[:, None]).astype(np.complex64)  # canvas point of every pixel
TAU = 2 * np.pi


class Pose:
    """A random affine map from figure points to canvas points.

    Args:
        size: range of the scale, in canvas units per figure unit.
        turn: largest rotation in either direction, in radians.
        shift: largest shift along each axis.
        stretch: largest ratio between the scales along a random axis and across it.
    """

    def __init__(self, rng, *, size, shift, stretch, turn=np.pi):
        self.scale = rng.uniform(*size)
        squeeze = stretch ** rng.uniform(0, 0.5)
        rotation = self.scale * np.exp(1j * rng.uniform(-turn, turn))
        self.direct = rotation * (squeeze + 1 / squeeze) / 2
        self.mirror = rotation * (squeeze - 1 / squeeze) / 2 * np.exp(1j * rng.uniform(0, TAU))
        self.offset = complex(*rng.uniform(-shift, shift, 2))

    def place(self, points):
        """Map figure points to canvas points."""
        return self.direct * points + self.mirror * np.conj(points) + self.offset

    def field(self):
        """Return the figure point under every pixel, complex64 (64, 64)."""
        moved = CANVAS - np.complex64(self.offset)
        area = abs(self.direct) ** 2 - abs(self.mirror) ** 2
        return np.complex64(np.conj(self.direct) / area) * moved - np.complex64(self.mirror / area) * np.conj(moved)

    def soft(self, depth):
        """Return the mask of `depth > 0` with an edge about one pixel wide. `depth` is a distance in figure units."""
        return np.clip(0.5 + depth * np.float32(self.scale * SIZE / 2), 0, 1)


def corners(radii, turn=0.25):
    """Return corners at equal angles with the given radii; the first one is at `turn` full turns."""
    return np.asarray(radii) * np.exp(1j * TAU * (np.arange(len(radii)) / len(radii) + turn))


def _fine(points):
    return np.stack(((points.real + 1) * SIZE, (1 - points.imag) * SIZE), -1).ravel().tolist()


def _averaged(sheet):
    return np.asarray(sheet.reduce(FINE // SIZE), np.float32) / 255


def polygons(contours, holes=()):
    """Return the mask of filled contours with holes cut out of them (all are complex arrays of canvas points)."""
    sheet = Image.new("L", (FINE, FINE))
    draw = ImageDraw.Draw(sheet)
    for contour in contours:
        draw.polygon(_fine(contour), fill=255)
    for contour in holes:
        draw.polygon(_fine(contour), fill=0)
    return _averaged(sheet)


def strokes(lines, width):
    """Return the mask of open polylines (complex arrays of canvas points). `width` is in pixels."""
    sheet = Image.new("L", (FINE, FINE))
    draw = ImageDraw.Draw(sheet)
    for line in lines:
        draw.line(_fine(line), fill=255, width=max(1, round(width * FINE / SIZE)), joint="curve")
    return _averaged(sheet)


def dust(points, gain):
    """Return the mask of a cloud of canvas points: `gain` times the share of each pixel's quarters that contain one."""
    column = ((points.real + 1) * SIZE).astype(np.int64)
    row = ((1 - points.imag) * SIZE).astype(np.int64)
    inside = (column >= 0) & (column < FINE) & (row >= 0) & (row < FINE)
    counts = np.bincount(row[inside] * FINE + column[inside], minlength=FINE * FINE)
    filled = np.minimum(counts, 1).reshape(SIZE, 2, SIZE, 2).sum((1, 3))
    return np.minimum(filled * np.float32(gain / 4), 1).astype(np.float32)


def curve(knots, samples=8):
    """Return a smooth open curve (Catmull-Rom) through complex knots, with `samples` points per segment."""
    ends = np.concatenate((2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]))
    t = np.linspace(0, 1, samples, endpoint=False)
    a, b, c, d = (ends[k : len(ends) - 3 + k, None] for k in range(4))
    square = a - 2.5 * b + 2 * c - d / 2
    cube = 1.5 * (b - c) + (d - a) / 2
    bent = b + t * (c - a) / 2 + t**2 * square + t**3 * cube
    return np.append(bent.ravel(), knots[-1])


def smooth_noise(rng, cells):
    """Return a random field, float32 (64, 64) in 0..1, with about `cells` bumps across the canvas."""
    sheet = Image.fromarray(rng.random((cells + 2, cells + 2), np.float32))
    edge = rng.uniform(0, 1, 2)
    box = (edge[0], edge[1], edge[0] + cells, edge[1] + cells)
    return np.asarray(sheet.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))


def ramp(rng, strength):
    """Return a random linear ramp over the canvas, float32 (64, 64), within about +-2 * strength."""
    direction = rng.uniform(-strength, strength, 2).astype(np.float32)
    return direction[0] * CANVAS.real + direction[1] * CANVAS.imag


def two_colors(rng):
    """Return two random colors of different brightness, float32 (2, 3) in 0..1."""
    while True:
        pair = rng.random((2, 3), np.float32)
        gray = pair @ np.array([0.3, 0.6, 0.1], np.float32)
        if abs(gray[0] - gray[1]) > 0.25:
            return pair


def backdrop(rng, color, clutter=4):
    """Return a background, float32 (64, 64, 3): a color gradient with up to `clutter` random lines and discs."""
    sheet = Image.new("RGB", (SIZE, SIZE), tuple(int(255 * c) for c in color))
    draw = ImageDraw.Draw(sheet)
    for _ in range(rng.integers(0, clutter + 1)):
        x, y, dx, dy = rng.uniform(0, SIZE, 4)
        mixed = np.clip(color + rng.uniform(-0.35, 0.35, 3), 0, 1)
        ink = tuple(int(255 * c) for c in mixed)
        if rng.random() < 0.5:
            draw.line((x, y, dx, dy), fill=ink, width=int(rng.integers(1, 3)))
        else:
            r = rng.uniform(1, 5)
            draw.ellipse((x - r, y - r, x + r, y + r), fill=ink)
    slope = ramp(rng, 0.15)[..., None] * rng.uniform(0.3, 1, 3).astype(np.float32)
    return np.asarray(sheet, np.float32) / 255 + slope


def finish(rng, image):
    """Add uneven light and noise, and convert float (64, 64, 3) in 0..1 to uint8."""
    image = image * (1 + ramp(rng, 0.2))[..., None]
    image += rng.uniform(0.01, 0.06) * rng.standard_normal(image.shape, np.float32)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def paint(rng, mask, inner=None, clutter=4):
    """Draw the image of a mask, with the mask `inner` in another color on top: uint8 (64, 64, 3)."""
    back, front = two_colors(rng)
    image = backdrop(rng, back, clutter)
    fill = front + ramp(rng, 0.2)[..., None]
    image += mask[..., None].astype(np.float32) * (fill - image)
    if inner is not None:
        image += inner[..., None].astype(np.float32) * (rng.random(3, np.float32) - image)
    return finish(rng, image)
