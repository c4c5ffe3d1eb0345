"""Mean, deviation, size and resampling come from the folder, and go back out with the model."""

import dataclasses
import json

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from blip2_jax.data import transforms
from blip2_jax.models.vit import CLIP_MEAN, ViTConfig, normalize_images
from blip2_jax.weights import checkpoint, huggingface, images
from blip2_jax.weights.files import WeightsError
from tests.weights import models

SIDE = {"height": 28, "width": 28}
HALF = [0.5, 0.4, 0.6]
SIZES = ViTConfig(**{
    "image_size": 28, "patch_size": 7, "hidden_size": 64, "num_layers": 1, "num_heads": 2,
})  # fmt: skip
PROCESSORS = {
    "blip": BlipImageProcessorPil(size=SIDE),
    "own colors": BlipImageProcessorPil(size=SIDE, image_mean=HALF, image_std=[0.2, 0.3, 0.9]),
    "siglip": SiglipImageProcessorPil(size=SIDE),
    "bilinear": ViTImageProcessorPil(size=SIDE),
    "lanczos": BlipImageProcessorPil(size=SIDE, resample=1),
    "not rescaled": BlipImageProcessorPil(size=SIDE, do_rescale=False, image_mean=[100.0] * 3),
    "another factor": BlipImageProcessorPil(size=SIDE, rescale_factor=1 / 127.5),
    "not normalized": BlipImageProcessorPil(size=SIDE, do_normalize=False),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SIDE),
    "clip with a border": CLIPImageProcessorPil(size={"shortest_edge": 33}, crop_size=SIDE),
}


def write(folder, document, nested=False):
    folder.mkdir(exist_ok=True)
    name, content = images.PREPROCESSOR, document
    if nested:
        name, content = images.PROCESSOR, {"image_processor": document, "num_query_tokens": 5}
    (folder / name).write_text(json.dumps(content))
    return folder


def read(folder):
    return images.settings(folder, SIZES, "blip_2_vision_model", whole=True)


def pixels(image, sizes):
    resizing = transforms.resizing_of(sizes)
    array = transforms.resize(image, sizes.image_size, **resizing)
    return np.asarray(normalize_images(array[None], sizes.image_mean, sizes.image_std))[0]


@pytest.mark.parametrize("shape", [(40, 55), (61, 30), (28, 28)], ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_images_become_the_numbers_of_transformers(name, shape, tmp_path):
    processor = PROCESSORS[name]
    processor.save_pretrained(tmp_path / "saved")
    document = json.loads((tmp_path / "saved/preprocessor_config.json").read_text())
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8))
    wanted = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    for nested in (False, True):  # transformers 5 writes the same inside processor_config.json
        sizes = read(write(tmp_path / f"{nested}", document, nested))
        np.testing.assert_allclose(pixels(image, sizes), wanted, atol=2e-5 * np.abs(wanted).max())
        out = tmp_path / f"out-{nested}"
        out.mkdir()
        images.write(out, sizes)
        back = read(out)
        assert dataclasses.replace(back, image_mean=(), image_std=()) == dataclasses.replace(
            sizes, image_mean=(), image_std=()
        )
        np.testing.assert_allclose(back.image_mean + back.image_std,
                                   sizes.image_mean + sizes.image_std, rtol=1e-12)  # fmt: skip


def test_defaults_of_a_class_are_those_of_transformers():
    classes = {
        "Blip": BlipImageProcessorPil, "CLIP": CLIPImageProcessorPil,
        "Siglip": SiglipImageProcessorPil, "ViT": ViTImageProcessorPil,
    }  # fmt: skip
    assert images.DEFAULTS.keys() == classes.keys()
    for name, table in images.DEFAULTS.items():
        for key, value in table.items():
            assert (getattr(classes[name], key, None) or False) == (value or False), (name, key)


@pytest.mark.parametrize(
    ("document", "side"),
    [
        ({"size": 28}, 0),  # before 4.26
        ({"size": [28, 28]}, 0),
        ({"size": SIDE, "do_center_crop": True, "crop_size": 28}, 0),
        ({"feature_extractor_type": "CLIPFeatureExtractor", "size": 28, "crop_size": 28}, 28),
        ({"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": 32},
          "crop_size": SIDE}, 32),
    ],
)  # fmt: skip
def test_sizes_come_in_many_forms(document, side, tmp_path):
    sizes = read(write(tmp_path / "folder", document))
    assert sizes.shortest_edge == side and sizes.image_mean == CLIP_MEAN


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"size": {"height": 28, "width": 30}}, "size is .*'width': 30"),
        ({"size": {"longest_edge": 28}}, "size is .*longest_edge"),
        ({"size": {"shortest_edge": 28}}, "without do_center_crop"),
        ({"size": 32}, "images become 32 pixels wide, and the model .* reads 28"),
        ({"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": 28}, "a crop of 28"),
        ({"size": SIDE, "do_resize": False}, "do_resize is false"),
        ({"size": SIDE, "do_pad": True}, "do_pad is not supported"),
        ({"size": SIDE, "resample": 9}, "resample is 9; known"),
        ({"size": SIDE, "image_mean": [0.5]}, r"image_mean is \[0.5\]"),
        ({"size": SIDE, "image_std": [1, 0, 1]}, "no deviation may be 0"),
        ({"size": SIDE, "offset": True}, "an offset"),
        ({"image_processor_type": "BeitImageProcessor", "size": SIDE}, "image_mean, image_std is"),
    ],
)
def test_what_is_not_done_here_is_refused_by_name(document, message, tmp_path):
    with pytest.raises(WeightsError, match=message):
        read(write(tmp_path / "folder", document))
    (tmp_path / "folder/preprocessor_config.json").write_text("{")
    with pytest.raises(WeightsError, match="preprocessor_config.json is not JSON"):
        read(tmp_path / "folder")


def test_a_family_that_is_not_clips_has_to_say(tmp_path):
    assert images.settings(tmp_path, SIZES, "clip_vision_model", whole=False) == SIZES
    with pytest.raises(WeightsError, match="no preprocessor_config.json, .* a siglip_vision_model"):
        images.settings(tmp_path, SIZES, "siglip_vision_model", whole=False)


def test_a_model_computes_with_its_own_colors_and_takes_them_along(tmp_path):
    """Into a native folder, and out of one whose companions say something else."""
    theirs = models.generation("opt")
    theirs.save_pretrained(tmp_path / "hf")
    processor = BlipImageProcessorPil(size=SIDE, image_mean=HALF, image_std=HALF, resample=2)
    processor.save_pretrained(tmp_path / "hf")
    opened = checkpoint.open_checkpoint(str(tmp_path / "hf"))
    assert opened.config.vit.image_mean == tuple(HALF)
    params = opened.load(opened.abstract())
    checkpoint.save_native(tmp_path / "native", opened.config, params, companions=tmp_path / "hf")
    native = checkpoint.open_checkpoint(str(tmp_path / "native"))
    assert native.config == opened.config
    other = write(tmp_path / "other", {"size": SIDE, "image_mean": [0.1, 0.2, 0.3]})
    huggingface.save_blip2(tmp_path / "out", native.config, params, companions=other)
    back = BlipImageProcessorPil.from_pretrained(tmp_path / "out")
    assert list(back.image_mean) == list(back.image_std) == HALF and back.resample == 2
    assert checkpoint.open_checkpoint(str(tmp_path / "out")).config.vit == opened.config.vit


def test_a_tower_brings_its_colors_and_is_squeezed_as_blip2_does(tmp_path):
    config = transformers.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=28, patch_size=7,
    )  # fmt: skip
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    CLIPImageProcessorPil(image_mean=HALF, size={"shortest_edge": 336}).save_pretrained(
        tmp_path / "clip"
    )
    sizes = huggingface.vit_config(str(tmp_path / "clip"))
    assert sizes.image_mean == tuple(HALF) and sizes.shortest_edge == 0
