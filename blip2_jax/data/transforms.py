"""Images from bytes to the array that a model reads: uint8, normalized later on the device."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 64_000_000  # larger images are refused before they are decoded (decompression bombs)


class ImageError(ValueError):
    """Bytes that are not an image, or not one that should be decoded."""


def decode_image(data: bytes) -> Image.Image:
    """Decodes a JPEG, PNG or whatever Pillow reads, to upright RGB."""
    if not data:
        raise ImageError("no bytes")
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise ImageError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
        return upright_rgb(image)
    except UnidentifiedImageError as error:  # whose own message is an address in memory
        raise ImageError("not a readable image: of no known format") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"not a readable image: {error}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data say, as transformers' `load_image` does, then RGB."""
    return ImageOps.exif_transpose(image).convert("RGB")


def resize(image: Image.Image, size: int) -> np.ndarray:
    """The evaluation transform: bicubic to a square, aspect ratio not kept (LAVIS, HF)."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def random_resized_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.5, 1.0),
    flip: bool = True,
) -> np.ndarray:
    """The training transform (paper, section 3.4): random crop, resized, flipped half the time.

    Args:
      image: RGB.
      size: side of the result.
      rng: the only source of randomness.
      scale: share of the area that a crop keeps; (1, 1) keeps the whole image as it is.
      flip: mirror left and right half the time.
    """
    if tuple(scale) != (1.0, 1.0):
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=_crop(image, rng, scale))
    array = resize(image, size)
    return array[:, ::-1] if flip and rng.random() < 0.5 else array


def _crop(image: Image.Image, rng: np.random.Generator, scale) -> tuple[int, int, int, int]:
    """A box of random area and of aspect ratio 3/4 to 4/3 (torchvision's RandomResizedCrop)."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return x, y, x + w, y + h
    side = min(width, height)
    x, y = (width - side) // 2, (height - side) // 2
    return x, y, x + side, y + side
