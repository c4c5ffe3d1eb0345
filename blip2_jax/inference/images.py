"""Images from files, bytes, Pillow images and arrays, of any size and mode."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import jax.numpy as jnp
import numpy as np
from PIL import Image

from blip2_jax.data import transforms
from blip2_jax.data.transforms import ImageError


def open_image(image: Any) -> Image.Image:
    """An upright RGB image.

    Args:
      image: a path, a file:// URL, encoded bytes, an open file, a `PIL.Image`, or an array of
        NumPy, JAX or PyTorch: uint8[H, W, 3], [H, W, 1], [H, W, 4] or [H, W], or floats of such a
        shape in 0..1. Channels may also come first. A mapping with "bytes" or "path", as in Hugging
        Face's data sets, is what these hold.

    Raises:
      ImageError: it is not an image, or one without pixels.
    """
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, (str, os.PathLike)):
        image = _read(image)
    elif hasattr(image, "read"):
        image = _read_open(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return transforms.decode_image(bytes(image))
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ImageError(f"it has {image.width} x {image.height} pixels")
        return transforms.upright_rgb(image)
    return _of_array(image)


def _read(source: str | os.PathLike[str]) -> bytes:
    text = os.fspath(source)
    scheme = urlparse(text).scheme
    if scheme == "file":
        text = unquote(urlparse(text).path)
    elif len(scheme) > 1:  # one letter is a drive of Windows
        raise ImageError(f"{scheme}:// URLs are not fetched; download {text} first")
    try:
        return Path(text).read_bytes()
    except OSError as error:
        raise ImageError(f"{text}: {error.strerror}") from error


def _read_open(file: Any) -> bytes:
    """All bytes of an open file, whatever its position."""
    try:
        if hasattr(file, "seek") and (not hasattr(file, "seekable") or file.seekable()):
            file.seek(0)
        content = file.read()
    except (OSError, ValueError) as error:  # closed, or not text
        raise ImageError(f"an open file: {error}") from error
    if not isinstance(content, bytes):
        raise ImageError("the file is open for text; open it with mode 'rb'")
    return content


def _of_array(image: Any) -> Image.Image:
    if image is None:
        raise ImageError("None is not an image")
    try:
        if hasattr(image, "detach"):  # PyTorch's: NumPy knows neither its bfloat16 nor its devices
            image = image.detach().cpu()
            image = image.float() if image.is_floating_point() else image
        array = np.asarray(image)
        if jnp.issubdtype(array.dtype, jnp.floating):  # bfloat16 is one to JAX, not to NumPy
            array = array.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise ImageError(f"a {type(image).__name__} is not an image") from error
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)  # as PyTorch has them
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ImageError(f"shape {array.shape}; an image is [H, W, 3], [H, W, 4] or [H, W]")
    if 0 in array.shape:
        raise ImageError(f"shape {array.shape}: it has no pixels")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and 0 <= array.min() and array.max() <= 1):
            raise ImageError("floats must be in 0..1; pass whole numbers 0..255 as uint8")
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(f"dtype {array.dtype}; pass uint8 in 0..255 or floats in 0..1")
    return transforms.to_rgb(Image.fromarray(array))


def as_list(images: Any) -> Sequence[Any]:
    """Several images, or one alone, as a sequence.

    Raises:
      ValueError: it is None.
    """
    if images is None:
        raise ValueError("There are no images: None was given. Pass one, or a list.")
    if isinstance(images, np.ndarray) or hasattr(images, "__array__"):
        if getattr(images, "ndim", 0) == 4:
            return images
        return [images]
    alone = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image, Mapping)
    if isinstance(images, alone) or hasattr(images, "read"):
        return [images]
    return list(images)


def load_batch(
    images: Sequence[Any],
    size: int,
    *,
    first: int = 0,
    skip: dict[int, str] | None = None,
    **resizing: Any,
) -> np.ndarray:
    """Opens and resizes images, as in the evaluation transform: uint8[N, size, size, 3].

    Args:
      images: see `open_image`.
      size: side of the model's images, in pixels.
      first: number of the first one, for messages.
      skip: if given, what cannot be read becomes a black image, and its number and the reason
        are put in here.
      **resizing: how; see `transforms.resize`.

    Raises:
      ImageError: with the number of the image that cannot be read, and why.
    """
    arrays = []
    for number, image in enumerate(images, first):
        try:
            arrays.append(transforms.resize(open_image(image), size, **resizing))
        except ImageError as error:
            where = f" ({image})" if isinstance(image, (str, os.PathLike)) else ""
            if skip is None:
                raise ImageError(f"Image {number}{where} cannot be read: {error}.") from error
            skip[number] = str(error)
            arrays.append(np.zeros((size, size, 3), np.uint8))
    return np.stack(arrays) if arrays else np.zeros((0, size, size, 3), np.uint8)
