"""Images as the published models see them."""

import importlib.util
import io

import numpy as np
import pytest
from PIL import Image

import tests.data.made as made
from blip2_jax.data import transforms


def test_a_crop_is_what_cutting_and_resizing_gives():
    """torchvision's order: pixels beyond the crop have no part in it."""
    image = transforms.decode_image(made.jpeg(3, (120, 80)))
    array = transforms.random_resized_crop(image, 32, np.random.default_rng(5), flip=False)
    box = transforms.random_crop(120, 80, np.random.default_rng(5), (0.5, 1.0))
    expected = image.crop(box).resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(array, np.asarray(expected))


def test_crops_have_the_published_areas_and_ratios():
    rng = np.random.default_rng(0)
    boxes = np.array([transforms.random_crop(400, 300, rng, (0.5, 1.0)) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    assert left.min() == top.min() == 0 and right.max() == 400 and bottom.max() == 300
    width, height = right - left, bottom - top
    area, ratio = width * height / 120_000, width / height
    assert 0.495 < area.min() < 0.51 and area.max() > 0.97
    assert 0.74 < ratio.min() < 0.78 and 1.3 < ratio.max() < 1.345


def test_crops_are_distributed_as_torchvisions():
    """Area uniform, ratio uniform in its logarithm, place uniform: by Kolmogorov and Smirnov."""
    rng, width, height, scale = np.random.default_rng(0), 3000, 2000, (0.1, 0.2)  # all crops fit
    boxes = np.array([transforms.random_crop(width, height, rng, scale) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    w, h = right - left, bottom - top
    uniform = {
        "area": (w * h / (width * height) - scale[0]) / (scale[1] - scale[0]),
        "ratio": (np.log(w / h) - np.log(3 / 4)) / (np.log(4 / 3) - np.log(3 / 4)),
        "left": left / (width - w),
        "top": top / (height - h),
    }
    count = np.arange(len(boxes)) / len(boxes)
    for name, values in uniform.items():
        distance = np.abs(np.sort(values) - count).max()
        assert distance < 1.63 / len(boxes) ** 0.5, name  # one in a hundred goes beyond
    # A crop that does not fit is drawn again: areas and ratios stay within their bounds.
    boxes = [transforms.random_crop(400, 300, rng, (0.9, 1.0)) for _ in range(500)]
    shapes = np.array([(right - left, bottom - top) for left, top, right, bottom in boxes])
    assert (shapes.prod(axis=1) / 120_000 > 0.89).all() and (shapes <= (400, 300)).all()


@pytest.mark.parametrize(("size", "box"), [((1000, 10), (13, 10)), ((10, 1000), (10, 13))])
def test_an_image_too_narrow_for_any_crop_gives_its_middle(size, box):
    left, top, right, bottom = transforms.random_crop(*size, np.random.default_rng(0), (0.9, 1.0))
    assert (right - left, bottom - top) == box
    assert abs((left + right) - size[0]) <= 1 and abs((top + bottom) - size[1]) <= 1


def test_the_evaluation_transform_squashes_the_whole_image():
    image = transforms.decode_image(made.jpeg(1, (90, 40)))
    array = transforms.resize(image, 24)
    np.testing.assert_array_equal(array, np.asarray(image.resize((24, 24), 3)))
    assert array.dtype == np.uint8


def test_half_of_the_images_are_mirrored():
    image = transforms.decode_image(made.jpeg(1, (32, 32)))
    rng = np.random.default_rng(0)
    whole = np.asarray(image)
    seen = [transforms.random_resized_crop(image, 32, rng, scale=(1.0, 1.0)) for _ in range(200)]
    mirrored = sum(np.array_equal(array, whole[:, ::-1]) for array in seen)
    assert 75 < mirrored < 125
    assert all(np.array_equal(a, whole) or np.array_equal(a, whole[:, ::-1]) for a in seen)


# ------------------------------------------------------------------------------- RandAugment


def operation(name, magnitude=5.0, seed=0):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 200, (20, 20, 3)).astype(np.uint8))
    found = transforms.AUGMENTATIONS[name](image, magnitude, np.random.default_rng(seed))
    return np.asarray(image).astype(int), np.asarray(found).astype(int)


def test_the_operations_are_those_of_blip_image_train():
    assert list(transforms.AUGMENTATIONS) == [
        "identity", "autocontrast", "brightness", "sharpness", "equalize",
        "shear_x", "shear_y", "translate_x", "translate_y", "rotate",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["identity", "brightness", "sharpness"])
def test_at_the_published_magnitude_these_change_nothing(name):
    before, after = operation(name)
    np.testing.assert_array_equal(before, after)


def test_brightness_and_autocontrast():
    before, after = operation("brightness", 0.0)
    np.testing.assert_allclose(after, 0.1 * before, atol=1)
    _, after = operation("autocontrast")
    assert (after.min(axis=(0, 1)) == 0).all() and (after.max(axis=(0, 1)) >= 254).all()


@pytest.mark.parametrize(("name", "axis"), [("translate_x", 1), ("translate_y", 0)])
def test_translation_is_by_one_pixel_a_level_and_shows_gray(name, axis):
    shifts = set()
    for seed in range(8):
        before, after = operation(name, 5.0, seed)
        before, after = np.moveaxis(before, axis, 0), np.moveaxis(after, axis, 0)
        right = np.array_equal(after[5:], before[:-5]) and (after[:5] == 128).all()
        left = np.array_equal(after[:-5], before[5:]) and (after[-5:] == 128).all()
        assert right != left
        shifts.add(right)
    assert shifts == {True, False}  # both directions


@pytest.mark.parametrize(("name", "share"), [("shear_x", 0.15), ("shear_y", 0.15)])
def test_shear_moves_the_last_row_by_its_share(name, share):
    ramp = np.broadcast_to(np.arange(100)[None, :, None], (100, 100, 3)).astype(np.uint8)
    ramp = ramp if name == "shear_x" else ramp.transpose(1, 0, 2)
    sides = set()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        found = transforms.AUGMENTATIONS[name](Image.fromarray(ramp), 5, rng)
        moved = (np.asarray(found).astype(int) - ramp)[:, :, 0]
        moved = moved if name == "shear_x" else moved.T
        # Row 90 is read 13.5 pixels to a side; look where that is inside.
        shift = moved[90, 40:60].mean()
        assert abs(abs(shift) - 90 * share) < 1
        sides.add(shift > 0)
    assert sides == {True, False}


def test_rotation_is_by_three_degrees_a_level():
    image = Image.new("RGB", (101, 101))
    image.paste((255, 255, 255), (89, 49, 92, 52))
    sides = set()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        turned = np.asarray(transforms.AUGMENTATIONS["rotate"](image, 5, rng))
        inside = turned[35:65, 60:95].sum(axis=2)  # where nothing of the border shows
        y, x = np.unravel_index(inside.argmax(), inside.shape)
        angle = np.degrees(np.arctan2(y + 35 - 50, x + 60 - 50))
        assert abs(abs(angle) - 15) < 1.5
        sides.add(angle > 0)
    assert sides == {True, False}


def test_two_operations_are_drawn_and_each_is_done_half_the_time():
    array = np.random.default_rng(1).integers(0, 200, (20, 20, 3)).astype(np.uint8)
    rng = np.random.default_rng(0)
    changed = [not np.array_equal(transforms.rand_augment(array, rng), array) for _ in range(1000)]
    # 7 of 10 operations change something at magnitude 5: 1 - (1 - 0.35)^2
    assert abs(np.mean(changed) - (1 - 0.65**2)) < 0.05


def test_the_same_randomness_gives_the_same_image():
    def make(seed, **options):
        rng = np.random.default_rng(seed)
        return transforms.train_image(
            made.jpeg(0, (64, 48)), 32, rng, randaugment=(2, 5), **options
        )

    np.testing.assert_array_equal(make(1), make(1))
    assert not np.array_equal(make(1), make(2))


# ------------------------------------------------------------------------------ fast and broken


@pytest.mark.parametrize("size", [(640, 480), (200, 300), (90, 60)])
def test_the_fast_way_crops_the_same_and_looks_the_same(size):
    pytest.importorskip("cv2")
    pytest.importorskip("simplejpeg")
    data = made.jpeg(2, size)
    for seed in range(5):
        exact, fast = (
            transforms.train_image(data, 64, np.random.default_rng(seed), resize=way).astype(int)
            for way in transforms.RESIZES
        )
        assert np.abs(exact - fast).mean() < 3


def test_the_fast_way_reads_what_is_no_jpeg(tmp_path):
    pytest.importorskip("cv2")
    pytest.importorskip("simplejpeg")
    png = made.jpeg(2, (80, 60), kind="PNG")
    exact = transforms.resize(transforms.decode_image(png), 32).astype(int)
    fast = transforms.fast_image(png, 32, np.random.default_rng(0)).astype(int)
    assert np.abs(exact - fast).mean() < 3
    out = io.BytesIO()
    Image.fromarray(exact.astype(np.uint8)).convert("CMYK").save(out, "JPEG")
    assert transforms.fast_image(out.getvalue(), 32, np.random.default_rng(0)).shape == (32, 32, 3)


@pytest.mark.parametrize("resize", transforms.RESIZES)
def test_photographs_held_sideways_are_turned(resize):
    if resize == "fast":
        pytest.importorskip("cv2")
        pytest.importorskip("simplejpeg")
    image = transforms.decode_image(made.jpeg(2, (80, 60)))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to see it"
    out = io.BytesIO()
    image.save(out, "JPEG", exif=exif, quality=95)
    options = {"scale": (1.0, 1.0), "flip": False, "resize": resize}
    array = transforms.train_image(out.getvalue(), 60, np.random.default_rng(0), **options)
    expected = transforms.resize(image.rotate(-90, expand=True), 60)
    assert np.abs(array.astype(int) - expected).mean() < 3


BROKEN = {
    "no bytes": b"",
    "not a readable image": b"<html>404</html>" * 50,
    "not a readable image: damaged": made.jpeg(0, (300, 200))[:900],
    "too many pixels": made.bomb(),
}


@pytest.mark.parametrize("resize", transforms.RESIZES)
@pytest.mark.parametrize("reason", BROKEN)
def test_what_is_wrong_with_an_image_is_said(reason, resize):
    if resize == "fast":
        pytest.importorskip("cv2")
        pytest.importorskip("simplejpeg")
    with pytest.raises(transforms.ImageError) as error:
        transforms.train_image(BROKEN[reason], 16, np.random.default_rng(0), resize=resize)
    assert error.value.reason == reason


def encoded(image, kind="TIFF", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1", "I", "F", "LA", "LAB"])
def test_every_mode_becomes_rgb(mode):
    assert transforms.decode_image(encoded(Image.new(mode, (5, 4)))).mode == "RGB"


RAMP = np.linspace(0, 1, 256).reshape(16, 16)


@pytest.mark.parametrize(
    "values",
    [
        np.round(RAMP * 65535).astype(np.uint16),
        np.round(RAMP * 255).astype(np.int32),
        np.round(RAMP * 65535).astype(np.int32),
        np.round(RAMP * 1e9 - 1e6).astype(np.int32),
        RAMP.astype(np.float32),
        (RAMP * 255).astype(np.float32),
        (RAMP * 65535).astype(np.float32),
        (RAMP * 7 - 3).astype(np.float32),
    ],
    ids=["uint16", "int 255", "int 65535", "int", "0..1", "0..255", "0..65535", "-3..4"],
)
def test_gray_of_more_than_8_bits_is_scaled_to_8(values):
    data = encoded(Image.fromarray(values))
    if values.dtype == np.uint16:
        assert data != encoded(Image.fromarray(values), "PNG")
        data = encoded(Image.fromarray(values), "PNG")
    found = np.asarray(transforms.decode_image(data)).astype(float)
    np.testing.assert_allclose(found, np.repeat(255 * RAMP[..., None], 3, axis=2), atol=0.51)


def test_gray_images_keep_their_brightness():
    """A dark image stays dark: the scale comes from the type and range, not from the image."""
    for values in (np.full((4, 4), 257 * 30, np.uint16), np.full((4, 4), 30 / 255, np.float32)):
        assert transforms.decode_image(encoded(Image.fromarray(values))).getpixel((0, 0))[0] == 30
    odd = np.array([[np.nan, np.inf, 0.5, 1.0]], np.float32)
    pixels = np.asarray(transforms.decode_image(encoded(Image.fromarray(odd))))[0, :, 0]
    assert pixels.tolist() == [0, 255, 128, 255]


def transparent():
    """Red, half transparent green, and fully transparent blue, in every way that files have."""
    rgba = Image.new("RGBA", (3, 1))
    for x, color in enumerate([(200, 0, 0, 255), (0, 200, 0, 128), (0, 0, 200, 0)]):
        rgba.putpixel((x, 0), color)
    yield "RGBA", encoded(rgba, "PNG"), [(200, 0, 0), (127, 227, 127), (255, 255, 255)]
    yield "webp", encoded(rgba, "WEBP", lossless=True), [(200, 0, 0), None, (255, 255, 255)]
    gray = Image.merge("LA", (Image.new("L", (3, 1), 40), rgba.getchannel("A")))
    yield "LA", encoded(gray, "PNG"), [(40,) * 3, None, (255, 255, 255)]
    for mode, key in (("P", 2), ("L", 90), ("RGB", (0, 0, 200)), ("1", 1)):
        image = Image.new(mode, (3, 1), 0)
        if mode == "P":
            image.putpalette([0, 0, 0, 9, 9, 9, 0, 0, 200])
        image.putpixel((2, 0), key)
        data = encoded(image, "PNG", transparency=key)
        yield mode, data, [(0, 0, 0), None, (255, 255, 255)]
    palette = Image.new("P", (3, 1), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7] + [0] * 750)
    yield "bytes", encoded(palette, "PNG", transparency=b"\xff\x00"), [(255, 255, 255), None, None]
    deep = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    yield "I;16", encoded(deep, "PNG", transparency=65535), [(0, 0, 0), (1, 1, 1), (255, 255, 255)]


@pytest.mark.parametrize("resize", transforms.RESIZES)
def test_alpha_is_composed_on_a_color(resize):
    rng = np.random.default_rng(0)
    for name, data, expected in transparent():
        image = transforms.decode_image(data)
        for x, color in enumerate(expected):
            assert color is None or image.getpixel((x, 0)) == color, name
        red = transforms.decode_image(data, "#ff0000")
        assert red.getpixel((0 if name == "bytes" else 2, 0)) == (255, 0, 0), name
        plain = Image.open(io.BytesIO(data))
        if name != "I;16":
            dropped = transforms.decode_image(data, "drop")
            assert dropped.tobytes() == plain.convert("RGB").tobytes(), name
        if resize == "exact" or importlib.util.find_spec("cv2"):
            options = {"scale": (1.0, 1.0), "flip": False, "resize": resize}
            array = transforms.train_image(data, 3, rng, **options, alpha_background="#ff0000")
            assert array[0, 0 if name == "bytes" else 2].tolist() == [255, 0, 0], name


def test_opaque_images_are_what_they_were():
    rgba = Image.open(io.BytesIO(made.jpeg(2))).convert("RGBA")
    assert transforms.to_rgb(rgba).tobytes() == rgba.convert("RGB").tobytes()
    cmyk = encoded(Image.open(io.BytesIO(made.jpeg(2))).convert("CMYK"), "JPEG")
    expected = Image.open(io.BytesIO(cmyk)).convert("RGB")
    assert transforms.decode_image(cmyk).tobytes() == expected.tobytes()


def test_a_color_that_is_none_is_refused():
    with pytest.raises(ValueError, match="alpha_background is 'whit'.*'drop'"):
        transforms.background_color("whit")
