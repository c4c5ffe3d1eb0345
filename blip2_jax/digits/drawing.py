"""The embedded world in pixels: scenes drawn with real handwriting.

Digits are scikit-learn's copy of the UCI handwritten digits (1,797 scans of 8 x 8 pixels). Of
each digit's scans three quarters draw the training scenes and the others the test scenes.
"""

import functools

import numpy as np
from PIL import Image

from blip2_jax.digits import world

SIZE = 64  # pixels of a scene's side; a quadrant has half of it
PIXELS = {"small": (14, 17), "large": (24, 28)}  # side of a digit, from .. to
MARGIN = 1  # pixels between a digit and its quadrant's border
RGB = {
    "red": (226, 40, 40),
    "green": (52, 178, 62),
    "blue": (58, 92, 236),
    "yellow": (242, 222, 52),
    "purple": (152, 62, 188),
    "cyan": (60, 212, 220),
    "orange": (244, 140, 32),
    "white": (246, 246, 246),
}


@functools.cache
def handwriting(split: str) -> tuple[list[np.ndarray], ...]:
    """For each digit its scans, float32[8, 8] in 0..1; "train" and others share none."""
    from sklearn.datasets import load_digits  # a second of import, only where scenes are drawn

    scans, labels = load_digits(return_X_y=True)
    chosen = []
    for digit in range(10):
        indices = np.flatnonzero(labels == digit)
        indices = np.random.default_rng([7, digit]).permutation(indices)
        cut = 3 * len(indices) // 4
        indices = indices[:cut] if split == "train" else indices[cut:]
        chosen.append([(scans[row].reshape(8, 8) / 16).astype(np.float32) for row in indices])
    return tuple(chosen)


def _background(rng: np.random.Generator) -> np.ndarray:
    """float32[SIZE, SIZE, 3]: dark and muted, so that every color stands out; four kinds."""
    base = rng.uniform(15, 75) + rng.uniform(-12, 12, 3)
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    kind = rng.integers(4)
    if kind == 0:  # plain
        shade = np.zeros((SIZE, SIZE))
    elif kind == 1:  # gradient
        angle = rng.uniform(0, 2 * np.pi)
        shade = 35 * (x * np.cos(angle) + y * np.sin(angle))
    elif kind == 2:  # cloudy
        coarse = Image.fromarray(rng.uniform(-25, 25, (6, 6)).astype(np.float32))
        shade = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    else:  # stripes
        angle, waves = rng.uniform(0, np.pi), rng.uniform(3, 9)
        shade = 12 * np.sin(2 * np.pi * waves * (x * np.cos(angle) + y * np.sin(angle)))
    noise = rng.normal(0, 4, (SIZE, SIZE, 3))
    return np.clip(base + shade[..., None] + noise, 0, 110)


def _write(scan: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """One digit's ink, float32[side, side] in 0..1: a scan, enlarged, a little turned and slanted.

    Without these variations the encoder would memorize the 135 scans of a digit.
    """
    image = Image.fromarray(scan).resize((side, side), Image.Resampling.BICUBIC)
    turn, slant = rng.normal(0, 0.12, 2)
    stretch = rng.uniform(0.92, 1.12, 2)
    back = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    back = back @ np.array([[1, slant], [0, 1]]) * stretch
    center = np.full(2, (side - 1) / 2)
    shift = center - back @ center
    coefficients = (*back[0], shift[0], *back[1], shift[1])
    image = image.transform(
        (side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC
    )
    return np.clip(1.3 * np.asarray(image), 0, 1)


def draw(scene: world.Scene, rng: np.random.Generator, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Draws a scene.

    Args:
      scene: what to draw.
      rng: the only source of randomness.
      split: whose handwriting (see `handwriting`).

    Returns:
      uint8[SIZE, SIZE, 3], and boxes int32[n, 4]: y0, x0, y1, x1 of each thing.

    Raises:
      ValueError: a thing without a color, size or place.
    """
    canvas, boxes = _background(rng), []
    half = SIZE // 2
    for thing in scene:
        if thing.size is None or thing.color is None:
            raise ValueError(f"This digit has no size or no color: {thing}.")
        scans = handwriting(split)[thing.digit]
        low, high = PIXELS[thing.size]
        side = int(rng.integers(low, high + 1))
        ink = _write(scans[rng.integers(len(scans))], side, rng)[..., None]
        row, column = thing.corner
        y0 = half * (row == "bottom") + int(rng.integers(MARGIN, half - side - MARGIN + 1))
        x0 = half * (column == "right") + int(rng.integers(MARGIN, half - side - MARGIN + 1))
        color = np.clip(np.array(RGB[thing.color]) + rng.uniform(-14, 14, 3), 0, 255)
        patch = canvas[y0 : y0 + side, x0 : x0 + side]
        patch[:] = ink * color + (1 - ink) * patch
        boxes.append((y0, x0, y0 + side, x0 + side))
    return canvas.round().astype(np.uint8), np.array(boxes, np.int32)
