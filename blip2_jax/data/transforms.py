"""Images from bytes to the array that a model reads: uint8, normalized later on the device."""

import functools
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageColor, ImageEnhance, ImageOps

from blip2_jax.data.faults import RecordError

MAX_PIXELS = 64_000_000  # larger images are refused before they are decoded (decompression bombs)
RATIOS = (3 / 4, 4 / 3)  # width to height of a random crop, from .. to
WHITE, DROP = "white", "drop"  # of `alpha_background`
GRAY = (128, 128, 128)  # what RandAugment shows beyond an image's border (LAVIS)

RESAMPLES = {kind.name.lower(): kind for kind in Image.Resampling}

Box = tuple[int, int, int, int]  # left, top, right, bottom


class ImageError(RecordError):
    """Bytes that are not an image, or not one that should be decoded."""


def _open(data: bytes) -> Image.Image:
    """An image whose header was read and found to be in bounds; nothing is decoded yet."""
    if not data:
        raise ImageError("no bytes")
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise ImageError("too many pixels") from error
    except Exception as error:  # the errors of Pillow's readers have no common class
        raise ImageError("not a readable image") from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageError("too many pixels")
    return image


def decode_image(data: bytes, alpha_background: str = WHITE) -> Image.Image:
    """Decodes a JPEG, a PNG or another format of Pillow, to upright RGB.

    Args:
      data: of a file.
      alpha_background: see `to_rgb`.

    Raises:
      ImageError: not an image, a damaged one, or one of more than `MAX_PIXELS`.
    """
    image = _open(data)
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # a copy less than `upright_rgb` makes
        return to_rgb(image, alpha_background)
    except Exception as error:  # the errors of Pillow's readers have no common class
        raise ImageError("not a readable image: damaged") from error


def upright_rgb(image: Image.Image, alpha_background: str = WHITE) -> Image.Image:
    """Turned as its EXIF data say, as transformers' `load_image` does, then RGB; see `to_rgb`."""
    return to_rgb(ImageOps.exif_transpose(image), alpha_background)


@functools.cache
def background_color(name: str) -> tuple[int, int, int] | None:
    """The color that an `alpha_background` names; None: alpha is dropped.

    Raises:
      ValueError: it names none.
    """
    if name == DROP:
        return None
    try:
        red, green, blue = ImageColor.getcolor(name, "RGB")  # type: ignore[misc]  # of RGB: three
    except ValueError as error:
        raise ValueError(
            f"alpha_background is {name!r}: name a color (white, gray, #7f7f7f), or {DROP!r}."
        ) from error
    return red, green, blue


def to_rgb(image: Image.Image, alpha_background: str = WHITE) -> Image.Image:
    """An image of any mode as RGB, three times 8 bits.

    Where the published preprocessing is `convert("RGB")`, which cuts 16 bits, integers and floats
    off at 255 and shows what lies under transparent pixels, this differs:

        16 bits             scaled, 65535 is white
        integers, floats    scaled by the smallest of 0..1 (floats), 0..255 and 0..65535 that holds
                            all values; if none does, from the least to the largest
        alpha               composed on a color

    Args:
      image: decoded.
      alpha_background: what transparent pixels show: a color's name or #rrggbb; "drop": alpha is
        ignored, as in `convert("RGB")`.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        image = _scaled(image)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
    color = background_color(alpha_background)
    if color is None or not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*color, 255)), image).convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """A gray image of more than 8 bits as one of 8; LA where one of its values is transparent."""
    values = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    else:
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
        usual = [255.0, 65535.0] if image.mode == "I" else [1.0, 255.0, 65535.0]
        fitting = [top for top in usual if low >= 0 and high <= top]
        low, high = (0.0, fitting[0]) if fitting else (low, high)
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-9)
    gray = Image.fromarray(np.round(255 * np.clip(scaled, 0, 1)).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        gray.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return gray


def resizing_of(sizes: Any) -> dict[str, Any]:
    """The options of `resize` that an image encoder's config names."""
    return {"resample": sizes.resample, "shortest_edge": sizes.shortest_edge}


def resize(
    image: Image.Image, size: int, *, resample: str = "bicubic", shortest_edge: int = 0
) -> np.ndarray:
    """The evaluation transform.

    Args:
      image: RGB.
      size: side of the result.
      resample: a `RESAMPLES` name.
      shortest_edge: 0 squeezes the whole image into the square, as published for BLIP-2 (LAVIS,
        transformers). Otherwise the shorter side becomes so many pixels and the middle is cut out,
        as CLIP's processor does.

    Returns:
      uint8[size, size, 3]
    """
    if not shortest_edge:
        return np.asarray(_resized(image, size, resample))
    shorter, longer = min(image.size), max(image.size)
    scaled = int(shortest_edge * longer / shorter)
    sides = (shortest_edge, scaled) if image.width < image.height else (scaled, shortest_edge)
    image = image.resize(sides, RESAMPLES[resample])
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _resized(image: Image.Image, size: int, resample: str) -> Image.Image:
    if image.size == (size, size):
        return image
    return image.resize((size, size), RESAMPLES[resample])


def random_crop(
    width: int, height: int, rng: np.random.Generator, scale: tuple[float, float]
) -> Box | None:
    """A box of random area and aspect ratio, as torchvision's RandomResizedCrop draws it.

    Args:
      width, height: of the image, in pixels.
      rng: the only source of randomness.
      scale: share of the area that a crop keeps; (1, 1) keeps the whole image: None.
    """
    if tuple(scale) == (1.0, 1.0):
        return None
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = np.exp(rng.uniform(*np.log(RATIOS)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return x, y, x + w, y + h
    # The largest box in the middle whose ratio is allowed.
    w = min(width, round(height * RATIOS[1]))
    h = min(height, round(width / RATIOS[0]))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def random_resized_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.5, 1.0),
    flip: bool = True,
    resample: str = "bicubic",
) -> np.ndarray:
    """The training transform (paper, section 3.4): random crop, resized, flipped half the time.

    Args:
      image: RGB.
      size: side of the result.
      rng: the only source of randomness.
      scale: share of the area that a crop keeps; (1, 1) keeps the whole image as it is.
      flip: mirror left and right half the time.
      resample: a `RESAMPLES` name.

    Returns:
      uint8[size, size, 3]
    """
    box = random_crop(*image.size, rng, scale)
    # Cut first, as torchvision does: resize(box=...) would see pixels beyond the box.
    image = _resized(image if box is None else image.crop(box), size, resample)
    if flip and rng.random() < 0.5:  # by Pillow: NumPy copies three bytes at a time
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


# ---------------------------------------------------------------------------------- RandAugment


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=GRAY
    )


def _sign(rng: np.random.Generator) -> int:
    return -1 if rng.random() < 0.5 else 1


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=GRAY)


# The operations of LAVIS's `blip_image_train`; m is the magnitude, 0..10. At its magnitude of 5
# brightness and sharpness have a factor of 0.1 + 1.8 * 5 / 10 = 1: they change nothing there.
AUGMENTATIONS: dict[str, Callable[[Image.Image, float, np.random.Generator], Image.Image]] = {
    "identity": lambda image, m, rng: image,
    "autocontrast": lambda image, m, rng: ImageOps.autocontrast(image),
    "brightness": lambda image, m, rng: ImageEnhance.Brightness(image).enhance(0.1 + 0.18 * m),
    "sharpness": lambda image, m, rng: ImageEnhance.Sharpness(image).enhance(0.1 + 0.18 * m),
    "equalize": lambda image, m, rng: ImageOps.equalize(image),
    "shear_x": lambda image, m, rng: _affine(image, 1, _sign(rng) * 0.03 * m, 0, 0, 1, 0),
    "shear_y": lambda image, m, rng: _affine(image, 1, 0, 0, _sign(rng) * 0.03 * m, 1, 0),
    "translate_x": lambda image, m, rng: _affine(image, 1, 0, _sign(rng) * m, 0, 1, 0),
    "translate_y": lambda image, m, rng: _affine(image, 1, 0, 0, 0, 1, _sign(rng) * m),
    "rotate": lambda image, m, rng: _rotate(image, _sign(rng) * 3.0 * m),
}


def rand_augment(
    array: np.ndarray, rng: np.random.Generator, *, count: int = 2, magnitude: float = 5
) -> np.ndarray:
    """RandAugment as `blip_image_train` has it: `count` operations, each done half the time.

    Args:
      array: uint8[H, W, 3], cropped and flipped.
      rng: the only source of randomness.
      count: operations that are drawn, with replacement.
      magnitude: 0 to 10.
    """
    image = Image.fromarray(np.ascontiguousarray(array))
    names = list(AUGMENTATIONS)
    for name in [names[i] for i in rng.integers(len(names), size=count)]:
        if rng.random() < 0.5:
            image = AUGMENTATIONS[name](image, magnitude, rng)
    return np.asarray(image)


# ---------------------------------------------------------------------------------- whole chains

RESIZES = ("exact", "fast")


def train_image(
    data: bytes,
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.5, 1.0),
    flip: bool = True,
    randaugment: tuple[int, float] = (0, 0),
    resize: str = "exact",
    alpha_background: str = WHITE,
    resample: str = "bicubic",
) -> np.ndarray:
    """From a file's bytes to a training image, uint8[size, size, 3].

    Args:
      data: JPEG, PNG, ...
      size: side of the result.
      rng: the only source of randomness; both ways of resizing draw the same crops from it.
      scale, flip: see `random_resized_crop`.
      randaugment: operations and magnitude; LAVIS's `blip_image_train` has (2, 5), the paper and
        `blip2_image_train` none, (0, 0).
      resize: "exact": Pillow's antialiased bicubic, as the published models were trained with;
        "fast": see `fast_image`.
      alpha_background: see `to_rgb`.
      resample: a `RESAMPLES` name; "fast" has its own.
    """
    if resize == "fast":
        image = fast_image(
            data, size, rng, scale=scale, flip=flip, alpha_background=alpha_background
        )
    else:
        whole = decode_image(data, alpha_background)
        image = random_resized_crop(whole, size, rng, scale=scale, flip=flip, resample=resample)
    if randaugment[0]:
        image = rand_augment(image, rng, count=randaugment[0], magnitude=randaugment[1])
    return image


def _turned(data: bytes) -> bool:
    """Whether a JPEG's EXIF data say that it does not stand upright."""
    if b"Exif" not in data[: 1 << 16]:
        return False
    return _open(data).getexif().get(ExifTags.Base.Orientation, 1) != 1


def fast_image(
    data: bytes,
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (1.0, 1.0),
    flip: bool = False,
    alpha_background: str = WHITE,
) -> np.ndarray:
    """`random_resized_crop`, with libjpeg-turbo alone and OpenCV's area averaging.

    About half the time; the same crops, pixels that differ a little (docs/benchmarks.md).
    What is no plain JPEG goes through Pillow's decoder. Needs `pip install 'blip2_jax[fast]'`.
    """
    import cv2
    import simplejpeg

    try:
        height, width, kind, _ = simplejpeg.decode_jpeg_header(data)
        plain = kind != "CMYK" and not _turned(data)
    except ValueError:
        height = width = 0
        plain = False
    if not plain:
        image = decode_image(data, alpha_background)
        width, height = image.size
    elif width * height > MAX_PIXELS:
        raise ImageError("too many pixels")
    box = random_crop(width, height, rng, scale) or (0, 0, width, height)
    if plain:
        # JPEG decodes to a half, a quarter or an eighth for less, if the crop stays large enough.
        room = min(box[2] - box[0], box[3] - box[1]) / size
        shrink = next((n for n in (8, 4, 2) if n <= room), 1)
        try:
            pixels = simplejpeg.decode_jpeg(
                data,
                "RGB",
                min_width=-(-width // shrink),
                min_height=-(-height // shrink),
            )
        except ValueError as error:
            raise ImageError("not a readable image: damaged") from error
    else:
        pixels = np.asarray(image)
    x, y = pixels.shape[1] / width, pixels.shape[0] / height
    left, top, right, bottom = (
        round(edge * ratio) for edge, ratio in zip(box, (x, y, x, y), strict=True)
    )
    cut = pixels[top:bottom, left:right]
    kind = cv2.INTER_CUBIC if min(cut.shape[:2]) < size else cv2.INTER_AREA
    array = cv2.resize(cut, (size, size), interpolation=kind)
    return cv2.flip(array, 1) if flip and rng.random() < 0.5 else array
