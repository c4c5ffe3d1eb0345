"""CapFilt: captions made by one model and chosen by another (Li et al. 2022; BLIP-2, section 3.4).

The paper makes 10 captions an image with BLIP-large, ranks them and the original by CLIP
ViT-L/14's similarity, keeps two, and draws one of them at every step. Here any captioner and any
ranker take part; what is needed of them is two functions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from blip2_jax.data import texts, transforms

# uint8[N, H, W, 3] -> the captions of each image
Caption = Callable[[np.ndarray], list[list[str]]]
# uint8[N, H, W, 3] and M texts -> float[N, M], higher where they belong together
Similarity = Callable[[np.ndarray, Sequence[str]], np.ndarray]


class CapFilt:
    """Makes records with other captions.

    Args:
      caption: new captions of images.
      similarity: of images and texts.
      keep: captions that stay, of the new ones and of those that were there.
      size: side of the images that both see, in pixels; a function that knows its size resizes
        again what it gets.
      batch_size: images at once.
    """

    def __init__(
        self,
        caption: Caption,
        similarity: Similarity,
        *,
        keep: int = 2,
        size: int = 224,
        batch_size: int = 32,
    ):
        self.caption, self.similarity = caption, similarity
        self.keep, self.size, self.batch_size = keep, size, batch_size

    def __call__(
        self, images: list[Image.Image], records: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """The records with their best captions, best first, and `scores` of these."""
        changed = []
        for start in range(0, len(records), self.batch_size):
            part = slice(start, start + self.batch_size)
            pixels = np.stack([transforms.resize(image, self.size) for image in images[part]])
            changed += self._filter(pixels, records[part])
        return changed

    def _filter(self, pixels: np.ndarray, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        made = self.caption(pixels)
        candidates = [
            _different([*record["captions"], *new])
            for record, new in zip(records, made, strict=True)
        ]
        flat = [text for of_image in candidates for text in of_image]
        if not flat:
            return records
        scores = np.asarray(self.similarity(pixels, flat))
        changed, start = [], 0
        for row, (record, of_image) in enumerate(zip(records, candidates, strict=True)):
            own = scores[row, start : start + len(of_image)]
            start += len(of_image)
            best = np.argsort(-own, kind="stable")[: self.keep]
            changed.append(
                {
                    **record,
                    "captions": [of_image[i] for i in best],
                    "scores": [round(float(own[i]), 4) for i in best],
                }
            )
        return changed


def _different(captions: Sequence[str]) -> list[str]:
    """Captions that differ once they are cleaned, the first of each kind; no empty ones."""
    by_cleaned = {texts.clean_caption(caption): caption.strip() for caption in reversed(captions)}
    by_cleaned.pop("", None)
    return list(by_cleaned.values())[::-1]


def caption_by(model: Any, samples: int) -> Caption:
    """Captions sampled from a loaded model (`blip2_jax.load`), `samples` an image.

    Nucleus sampling with p = 0.9, as in BLIP's CapFilt (Li et al. 2022, section 4.1).
    """
    options = {"num_return_sequences": samples, "do_sample": True, "num_beams": 1, "top_p": 0.9}

    def caption(images: np.ndarray) -> list[list[str]]:
        captions = model.caption(images, **options)
        return [[text] for text in captions] if samples == 1 else [list(of) for of in captions]

    return caption


def similarity_by(model: Any) -> Similarity:
    """ITC similarity of a loaded model: the best of the queries' cosines."""
    return lambda images, texts: model.similarity(images, list(texts))
