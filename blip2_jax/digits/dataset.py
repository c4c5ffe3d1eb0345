"""The embedded world as a TFDS data set."""

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from blip2_jax.digits import drawing, world

CAPTIONS = 5  # a scene, as in COCO
SPLITS = ("train", "test", "held_out")


def record(seed: int, split: str, index: int) -> dict[str, Any]:
    """One record of the data set; depends on nothing but its arguments."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = world.sample_scene(rng, unseen=split == "held_out")
    image, boxes = drawing.draw(scene, rng, split)
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
        `world.UNSEEN_COMBINATIONS`, which "train" and "test" never do.
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
                    "image": tfds.features.Image(
                        shape=(drawing.SIZE, drawing.SIZE, 3), encoding_format="png"
                    ),
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
