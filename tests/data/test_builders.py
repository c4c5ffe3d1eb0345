"""The TFDS builder holds what `blip2 prepare` writes."""

import importlib.util
import json

import pytest

import tests.data.made as made
from blip2_jax import prepare
from blip2_jax.data import builders, prepared


@pytest.fixture
def coco(tmp_path):
    """COCO in LAVIS's form, with an image that is missing."""
    folder = tmp_path / "coco"
    names = made.write_images(folder / "images" / "val2014", 6)
    (folder / "annotations").mkdir()
    for split, some in (("train", names[:4]), ("test", names[4:])):
        rows = [{"image": f"val2014/{n}", "caption": [f"one of {n}", "two"]} for n in some]
        rows += [{"image": "val2014/missing.jpg", "caption": "none"}]
        (folder / "annotations" / f"coco_karpathy_{split}.json").write_text(json.dumps(rows))
    return folder


def build(coco, tmp_path, **options):
    builder = builders.ImageText(
        dataset="coco", dir=str(coco), splits=("train", "test"), data_dir=tmp_path, **options
    )
    builder.download_and_prepare()
    return builder


def test_it_builds_what_prepare_writes(coco, tmp_path):
    builder = build(coco, tmp_path / "tfds")
    assert builder.skipped["train"].by_reason == {"no such file": 1}
    for split, count in (("train", 4), ("test", 2)):
        words = ["--source=coco", f"--dir={coco}", f"--split={split}", f"--out={tmp_path / 'out'}"]
        prepare.main([*words, "--workers=0"])
        built = list(prepared.TfdsSource(tmp_path / "tfds", split))
        assert len(built) == count
        assert built == list(prepared.TfdsSource(tmp_path / "out", split))


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason="needs apache_beam")
def test_beam_builds_the_same(coco, tmp_path):
    build(coco, tmp_path / "one")
    build(coco, tmp_path / "beam", beam=True)
    for split in ("train", "test"):
        one, beam = (list(prepared.TfdsSource(tmp_path / n, split)) for n in ("one", "beam"))
        assert sorted(one, key=lambda r: r["id"]) == sorted(beam, key=lambda r: r["id"])
