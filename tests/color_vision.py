"""Color distances for normal and deficient color vision, and the search that chose the experts' colors.

python tests/color_vision.py        prints the palette of moe_bsr/visualize/theme.py
"""

import numpy as np

FIRST = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")  # Okabe and Ito, without black
COUNT = 64
# Simulation of protanopia and deuteranopia in linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
DEFICIENT = (
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
)
# Linear RGB to cones to Oklab (Ottosson 2020).
CONES = np.array(
    [
        [0.4122214708, 0.2119034982, 0.0883024619],
        [0.5363325363, 0.6806995451, 0.2817188376],
        [0.0514459929, 0.1073969566, 0.6299787005],
    ]
)
OKLAB = np.array(
    [
        [0.2104542553, 1.9779984951, 0.0259040371],
        [0.7936177850, -2.4285922050, 0.7827717662],
        [-0.0040720468, 0.4505937099, -0.8086757660],
    ]
)


def search() -> np.ndarray:
    """Return (64, 3) colors: `FIRST`, then repeatedly the candidate farthest from all colors chosen so far."""
    steps = np.linspace(0, 1, 18)
    candidates = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
    lightness, *tint = oklab(candidates)[0].T
    # Different in lightness from text and background, and not so saturated that one color stands out.
    candidates = candidates[(lightness > 0.42) & (lightness < 0.9) & (np.hypot(*tint) < 0.17)]
    chosen = np.array([rgb(text) for text in FIRST])
    grays = np.array([[0.85] * 3, [0.95] * 3])  # the colors of dropped patches
    nearest = np.min([distance(candidates, color) for color in [*chosen, *grays]], 0)
    while len(chosen) < COUNT:
        chosen = np.vstack([chosen, candidates[nearest.argmax()]])
        nearest = np.minimum(nearest, distance(candidates, chosen[-1]))
    return chosen


def distance(colors: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Return the (N,) Oklab distances of (N, 3) colors from a (3,) color, the least of the three kinds of vision."""
    pairs = zip(oklab(colors), oklab(one[None]), strict=True)
    return np.min([np.linalg.norm(a - b, axis=1) for a, b in pairs], 0)


def oklab(colors: np.ndarray) -> list[np.ndarray]:
    """Convert (N, 3) RGB to (N, 3) Oklab for normal, protanopic and deuteranopic vision."""
    light = linear(colors)
    eyes = (np.eye(3), *map(np.array, DEFICIENT))
    return [np.cbrt(np.clip(light @ eye.T, 0, 1) @ CONES) @ OKLAB for eye in eyes]


def lightness(colors: np.ndarray) -> np.ndarray:
    """Convert (..., 3) RGB to (...) relative luminance."""
    return linear(colors) @ (0.2126, 0.7152, 0.0722)


def linear(colors: np.ndarray) -> np.ndarray:
    return np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)


def rgb(text: str) -> np.ndarray:
    return np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)]) / 255


if __name__ == "__main__":
    print(" ".join("#" + "".join(f"{round(255 * v):02x}" for v in color) for color in search()))
