"""Image preprocessing of a folder: `preprocessor_config.json`, read and written.

Its settings go into the encoder's config: mean and deviation, how images are resized, and whether
they are cropped. transformers 5 writes the same inside `processor_config.json`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip2_jax.models.vit import CLIP_MEAN, CLIP_STD, ViTConfig
from blip2_jax.weights.files import WeightsError

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"

RESAMPLES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}

# Families that have CLIP's mean and deviation where the folder gives none; others must give them.
CLIP_COLORS = ("clip_vision_model", "blip_2_vision_model", "instructblip_vision_model")

_SQUARE: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_center_crop": False,
    "resample": 3,
    "crop_size": None,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_CLIP = {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}

# Defaults of transformers' image processors for keys that a file leaves out, by the class's name
# without its ending (`ImageProcessor`, `ImageProcessorFast`, `FeatureExtractor`, ...).
DEFAULTS: dict[str, Mapping[str, Any]] = {
    "Blip": {**_SQUARE, **_CLIP, "size": {"height": 384, "width": 384}},
    "CLIP": {
        **_SQUARE,
        **_CLIP,
        "size": {"shortest_edge": 224},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
    },
    "Siglip": {**_SQUARE, "size": {"height": 224, "width": 224}},
    "ViT": {**_SQUARE, "size": {"height": 224, "width": 224}, "resample": 2},
}
HARMLESS = ("do_convert_rgb",)  # images are RGB here


class _Settings:
    """A parsed `preprocessor_config.json`, with its class's defaults."""

    def __init__(self, document: Mapping[str, Any], path: Path):
        self.document, self.path = document, path
        name = document.get("image_processor_type") or document.get("feature_extractor_type") or ""
        family = name.partition("ImageProcessor")[0].removesuffix("FeatureExtractor")
        if name and family not in DEFAULTS:
            # Complete files need no defaults.
            missing = [key for key in ("size", "image_mean", "image_std") if key not in document]
            if missing:
                raise self.error(f"{', '.join(missing)} is missing, and the class {name} unknown")
        self._defaults = DEFAULTS.get(family, DEFAULTS["Blip"])

    def error(self, problem: str) -> WeightsError:
        return WeightsError(f"{self.path}: {problem}.")

    def __getitem__(self, key: str) -> Any:
        value = self.document.get(key)
        return self._defaults[key] if value is None else value

    def colors(self, key: str) -> tuple[float, ...]:
        value = self[key]
        several = [value] * 3 if isinstance(value, (int, float)) else value
        numbers = isinstance(several, list) and all(isinstance(x, (int, float)) for x in several)
        if not numbers or len(several) != 3:
            raise self.error(f"{key} is {value!r}; it must be three numbers")
        return tuple(map(float, several))

    def side(self, key: str) -> tuple[str, int]:
        """A size in any of its forms: ("square", side) or ("shortest_edge", side)."""
        size = self[key]
        if isinstance(size, int):  # before 4.26: the class decides what it means
            short = key == "size" and "shortest_edge" in self._defaults["size"]
            return ("shortest_edge" if short else "square"), size
        if isinstance(size, list) and len(size) == 2:
            size = {"height": size[0], "width": size[1]}
        if isinstance(size, Mapping):
            if set(size) == {"height", "width"} and size["height"] == size["width"]:
                return "square", int(size["height"])
            if set(size) == {"shortest_edge"}:
                return "shortest_edge", int(size["shortest_edge"])
        raise self.error(
            f"{key} is {size}; known: one number, {{height, width}} of a square, {{shortest_edge}}"
        )


def settings(folder: Path, sizes: ViTConfig, family: str, *, whole: bool) -> ViTConfig:
    """An encoder's config with its folder's image preprocessing.

    Args:
      folder: may hold `preprocessor_config.json` or `processor_config.json`.
      sizes: the encoder's, of its `config.json`.
      family: its `model_type`.
      whole: whether the folder holds a whole BLIP-2, whose size and crop count. A tower's images
        are squeezed into a square whatever its own model did, as BLIP-2 does with CLIP's.

    Raises:
      WeightsError: a setting that is not supported; no settings, and the family is not one of
        CLIP's.
    """
    document = _find(folder)
    if document is None:
        if family not in CLIP_COLORS:
            raise WeightsError(
                f"{folder} has no {PREPROCESSOR}, which says by what mean and deviation a {family} "
                "reads its images; download it with the weights."
            )
        return sizes
    return _apply(_Settings(*document), sizes, whole=whole)


def _find(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The document and its file; as in transformers, `processor_config.json` is asked first."""
    for name in (PROCESSOR, PREPROCESSOR):
        path = folder / name
        if not path.is_file():
            continue
        try:
            document = json.loads(path.read_text())
        except ValueError as error:
            raise WeightsError(f"{path} is not JSON ({error}); download it again.") from error
        if name == PREPROCESSOR:
            return document, path
        if isinstance(document.get("image_processor"), dict):
            return document["image_processor"], path
    return None


def _apply(settings: _Settings, sizes: ViTConfig, *, whole: bool) -> ViTConfig:
    known = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", *HARMLESS)
    for key, value in settings.document.items():
        if key.startswith("do_") and value and key not in known:
            raise settings.error(f"{key} is not supported")
    if settings.document.get("offset") or settings.document.get("rescale_offset"):
        raise settings.error("an offset beside rescale_factor is not supported")
    mean, std = settings.colors("image_mean"), settings.colors("image_std")
    if not settings["do_normalize"]:
        mean, std = (0.0,) * 3, (1.0,) * 3
    if not all(std):
        raise settings.error(f"image_std is {std}; no deviation may be 0")
    # Values are divided by 255 here; another factor goes into mean and deviation.
    scale = 255.0 * settings["rescale_factor"] if settings["do_rescale"] else 255.0
    if abs(scale - 1.0) > 1e-6:
        mean, std = (tuple(x / scale for x in numbers) for numbers in (mean, std))
    if settings["resample"] not in RESAMPLES:
        raise settings.error(f"resample is {settings['resample']!r}; known: {RESAMPLES}")
    sizes = dataclasses.replace(
        sizes, image_mean=mean, image_std=std, resample=RESAMPLES[settings["resample"]]
    )
    return _geometry(settings, sizes) if whole else sizes


def _geometry(settings: _Settings, sizes: ViTConfig) -> ViTConfig:
    if not settings["do_resize"]:
        raise settings.error("do_resize is false, but images are always resized here")
    form, side = settings.side("size")
    result = side
    if settings["do_center_crop"]:
        result = settings.side("crop_size")[1]
        if form == "square" and side != result or side < result:
            raise settings.error(f"a crop of {result} out of {form} {side} pixels is not supported")
    elif form == "shortest_edge":
        raise settings.error(
            "shortest_edge without do_center_crop leaves images that are no squares"
        )
    if result != sizes.image_size:
        raise settings.error(
            f"images become {result} pixels wide, and the model of config.json reads "
            f"{sizes.image_size}; one of the two files is of another model"
        )
    return dataclasses.replace(sizes, shortest_edge=side if form == "shortest_edge" else 0)


def document_of(sizes: ViTConfig) -> dict[str, Any]:
    """The `preprocessor_config.json` that transformers reads for an encoder."""
    side: dict[str, int] = {"height": sizes.image_size, "width": sizes.image_size}
    names = {name: number for number, name in RESAMPLES.items()}
    document = {
        "image_processor_type": "BlipImageProcessor",
        "do_resize": True,
        "size": side,
        "resample": names[sizes.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(sizes.image_mean),
        "image_std": list(sizes.image_std),
        "do_convert_rgb": True,
    }
    if sizes.shortest_edge:
        document |= {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": sizes.shortest_edge},
            "do_center_crop": True,
            "crop_size": side,
        }
    return document


def write(folder: Path, sizes: ViTConfig) -> None:
    """Writes an encoder's preprocessing into a folder, unless the folder has just that already."""
    existing = _find(folder)
    if existing is not None:
        try:
            if _apply(_Settings(*existing), sizes, whole=True) == sizes:
                return
        except WeightsError:
            pass  # the copied file has settings that this model does not
    path = folder / PREPROCESSOR
    document = document_of(sizes)
    if existing is not None and existing[1].name == PROCESSOR:
        path = existing[1]
        document = {**json.loads(path.read_text()), "image_processor": document}
    path.write_text(json.dumps(document, indent=2) + "\n")
