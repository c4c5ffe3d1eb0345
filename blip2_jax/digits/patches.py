"""Examples of the image encoder's pre-training: images, and what each of their patches shows."""

import json
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from blip2_jax.data.batch_spec import ArraySpec, Spec
from blip2_jax.data.examples import Example, ExampleOf, image_reader
from blip2_jax.data.language import LanguageConfig
from blip2_jax.data.source import Record
from blip2_jax.digits import drawing, world

# Attribute -> its values, in the order of the classes; the background is the class after them.
ATTRIBUTES: dict[str, list[Any]] = {
    "digit": list(range(10)),
    "color": list(world.COLORS),
    "size": list(world.SIZES),
    "place": list(world.PLACES),
}


def load_tokenizers(config: ConfigDict) -> dict[str, Any]:
    """None: there are no texts."""
    del config
    return {}


def example_spec(config: ConfigDict, image_size: int, llm: LanguageConfig | None = None) -> Spec:
    """See `data.batch_spec`; for each attribute int32[G * G], the class of each patch."""
    del llm
    patches = (image_size // config.model.vit.patch_size) ** 2
    labels = dict.fromkeys(config.stage.labels, ArraySpec((patches,), np.int32))
    return {"image": ArraySpec((image_size, image_size, 3), np.uint8), **labels}


def make_example(
    config: ConfigDict,
    image_size: int,
    *,
    train: bool,
    resample: str = "bicubic",
    llm: LanguageConfig | None = None,
) -> ExampleOf:
    """See `data.examples.make_example`."""
    del llm
    image = image_reader(config.data, image_size, resample, train=train)
    grid, labels = image_size // config.model.vit.patch_size, config.stage.labels

    def example(record: Record, index: int, rng: np.random.Generator) -> Example:
        del index
        arrays: Example = {"image": image(record, rng)}
        scene = world.scene_from_json(record["scene"])
        owner = patch_owners(record["boxes"], grid)
        for name, classes in labels.items():
            values = [ATTRIBUTES[name].index(getattr(thing, name)) for thing in scene]
            arrays[name] = np.array([*values, classes - 1], np.int32)[owner]
        return arrays

    return example


def patch_owners(boxes: str, grid: int) -> np.ndarray:
    """Which thing each patch shows: int32[grid * grid], row by row; -1 is the background.

    Args:
      boxes: a record's `boxes`.
      grid: patches along a side. A thing owns a patch when its box covers more than half of it;
        boxes of different things share no patch by more than that.
    """
    side = drawing.SIZE / grid
    edges = np.arange(grid) * side
    owners = np.full((grid, grid), -1, np.int32)
    for thing, (y0, x0, y1, x1) in enumerate(json.loads(boxes)):
        heights = np.clip(np.minimum(edges + side, y1) - np.maximum(edges, y0), 0, None)
        widths = np.clip(np.minimum(edges + side, x1) - np.maximum(edges, x0), 0, None)
        owners[np.outer(heights, widths) > 0.5 * side * side] = thing
    return owners.ravel()
