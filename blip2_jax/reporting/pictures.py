"""Test images with the model's captions and answers, and attention over images."""

import base64
import io
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

_MAX_QUERIES = 7  # with the image itself, one row of the page

_PICTURE = 192  # pixels of a heatmap's side; pictures of 64 pixels become three times as large


def example_card(example: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of an example: its image, captions, and questions with answers."""
    return {
        "image": data_uri(example["image"]),
        "reference": example.get("reference"),
        "caption": example.get("caption"),
        "correct": _right_or_wrong(example),
        "questions": [
            {"answer": None, "prediction": None} | dict(q) | {"correct": _right_or_wrong(q)}
            for q in example.get("questions") or ()
        ],
    }


def _right_or_wrong(item: Mapping[str, Any]) -> bool | None:
    return None if item.get("correct") is None else bool(item["correct"])


def data_uri(image: bytes | np.ndarray) -> str:
    """An image inside a page: a file's bytes, or uint8[H, W, 3], which becomes a PNG."""
    if not isinstance(image, bytes):
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"An image must be uint8[H, W, 3], got {image.dtype}{image.shape}.")
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", optimize=True)
        image = buffer.getvalue()
    kind = "jpeg" if image.startswith(b"\xff\xd8") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def attention_maps(item: Mapping[str, Any], number: int) -> dict[str, Any]:
    """What the page shows of float[Q, h, w]: heatmaps over the image, of the chosen queries."""
    image, maps = np.asarray(item["image"]), np.asarray(item["attention"], float)
    if maps.ndim != 3:
        raise ValueError(f"attention[{number}] must be float[Q, h, w], got shape {maps.shape}.")
    maps = np.nan_to_num(maps)
    queries = item.get("queries")
    if queries is None:
        queries = sorted(_most_concentrated(maps))
    return {
        "image": data_uri(image),
        "text": item.get("text"),
        "overlays": [(int(q), data_uri(overlay(image, maps[q]))) for q in queries],
    }


def _most_concentrated(maps: np.ndarray) -> np.ndarray:
    """The queries of lowest entropy: those that look somewhere rather than everywhere."""
    shares = np.maximum(maps.reshape(len(maps), -1), 1e-12)
    shares /= shares.sum(axis=1, keepdims=True)
    return np.argsort((-shares * np.log(shares)).sum(axis=1), kind="stable")[:_MAX_QUERIES]


def overlay(image: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """Attention over an image: gray where none is, glowing where it is highest.

    Args:
      image: uint8[H, W, 3].
      attention: float[h, w], any scale; the patches' grid.

    Returns:
      uint8[192, 192 * W / H, 3].
    """
    size = (max(1, round(_PICTURE * image.shape[1] / image.shape[0])), _PICTURE)
    large = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.NEAREST), float) / 255
    low, high = attention.min(), attention.max()
    heat = ((attention - low) / ((high - low) or 1.0)).astype(np.float32)
    heat = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    glow = matplotlib.colormaps["inferno"](heat)[..., :3]
    faded = 0.5 * large + 0.2 * large.mean(axis=2, keepdims=True)
    strength = 0.75 * heat[..., None] ** 0.8
    return np.rint(255 * ((1 - strength) * faded + strength * glow).clip(0, 1)).astype(np.uint8)
