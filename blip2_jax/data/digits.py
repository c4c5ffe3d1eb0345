"""The embedded world in pixels: scenes drawn with real handwriting, as a TFDS data set.

Digits are scikit-learn's copy of the UCI handwritten digits (1,797 scans of 8 x 8 pixels). Of
each digit's scans three quarters draw the training scenes and the others the test scenes.
"""

import functools
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from blip2_jax.data import world

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
CAPTIONS = 5  # a scene, as in COCO
SPLITS = ("train", "test", "held_out")


@functools.cache
def handwriting(split: str) -> tuple[list[np.ndarray], ...]:
    """For each digit its scans, float32[8, 8] in 0..1; "train" and others share none."""
    from sklearn.datasets import load_digits  # a second of import, only where scenes are drawn

    scans, labels = load_digits(return_X_y=True)
    chosen = []
    for digit in range(10):
        rows = np.flatnonzero(labels == digit)
        rows = np.random.default_rng([7, digit]).permutation(rows)
        cut = 3 * len(rows) // 4
        rows = rows[:cut] if split == "train" else rows[cut:]
        chosen.append([(scans[row].reshape(8, 8) / 16).astype(np.float32) for row in rows])
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

    Writers differ by a few degrees; without them 135 scans a digit would soon be known by heart.
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
      ValueError: a thing whose color, size or place is not said.
    """
    canvas, boxes = _background(rng), []
    half = SIZE // 2
    for thing in scene:
        if thing.size is None or thing.color is None:
            raise ValueError(f"Nobody said what this looks like: {thing}.")
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


def record(seed: int, split: str, index: int) -> dict[str, Any]:
    """One record of the data set; depends on nothing but its arguments."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = world.sample_scene(rng, held_out=split == "held_out")
    image, boxes = draw(scene, rng, split)
    png = io.BytesIO()
    Image.fromarray(image).save(png, format="PNG")
    return {
        "id": f"{split}_{index:05d}",
        "image": io.BytesIO(png.getvalue()),  # encoded: TFDS needs no TensorFlow for bytes
        "captions": world.captions(scene, rng, CAPTIONS),
        "questions": [question._asdict() for question in world.questions(scene, rng)],
        "scene": world.scene_to_json(scene),
        "boxes": json.dumps(boxes.tolist()),
    }


class DigitScenes(tfds.core.GeneratorBasedBuilder):
    """Scenes of handwritten digits with captions and questions.

    Args:
      seed: of all scenes.
      sizes: number of records by split; "held_out" scenes hold a combination of
        `world.HELD_OUT`, which "train" and "test" never do.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, seed: int = 0, sizes: dict[str, int] | None = None, **kwargs: Any):
        self.seed = seed
        self.sizes = sizes or {"train": 8000, "test": 500, "held_out": 200}
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return self.dataset_info_from_configs(
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "id": text,
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
                    "captions": tfds.features.Sequence(text),
                    "questions": tfds.features.Sequence(
                        {"question": text, "answer": text, "type": text}
                    ),
                    "scene": text,
                    "boxes": text,
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for index in tqdm(range(self.sizes[split]), desc=split, unit=" scenes"):
            example = record(self.seed, split, index)
            yield example["id"], example


def patch_owners(boxes: str, grid: int) -> np.ndarray:
    """Which thing each patch shows: int32[grid * grid], row by row; -1 is the background.

    Args:
      boxes: a record's `boxes`.
      grid: patches along a side. A thing owns a patch when its box covers more than half of it;
        boxes of different things share no patch by more than that.
    """
    side = SIZE / grid
    edges = np.arange(grid) * side
    owners = np.full((grid, grid), -1, np.int32)
    for thing, (y0, x0, y1, x1) in enumerate(json.loads(boxes)):
        rows = np.clip(np.minimum(edges + side, y1) - np.maximum(edges, y0), 0, None)
        columns = np.clip(np.minimum(edges + side, x1) - np.maximum(edges, x0), 0, None)
        owners[np.outer(rows, columns) > 0.5 * side * side] = thing
    return owners.ravel()
