"""The embedded world on disk: drawn right, split right, and the same bytes every time."""

import json
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from blip2_jax.data import prepared, transforms
from blip2_jax.digits import dataset, drawing, patches, prepare, world

SIZES = {"train": 12, "test": 6, "held_out": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "digits"
    assert prepare.write(out, 0, SIZES) == 0
    return out


def test_training_and_test_handwriting_are_disjoint():
    for train, test in zip(drawing.handwriting("train"), drawing.handwriting("test"), strict=True):
        assert len(train) > 2 * len(test) > 50
        seen = {scan.tobytes() for scan in train}
        assert not any(scan.tobytes() in seen for scan in test)


def test_things_are_drawn_in_their_quadrant_and_color():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = world.sample_scene(rng)
        image, boxes = drawing.draw(scene, rng, "train")
        for thing, (y0, x0, y1, x1) in zip(scene, boxes, strict=True):
            row, column = thing.place.split()
            assert (y0 >= 32) == (row == "bottom") and (y1 > 32) == (row == "bottom")
            assert (x0 >= 32) == (column == "right") and (x1 > 32) == (column == "right")
            low, high = drawing.PIXELS[thing.size]
            assert low <= y1 - y0 == x1 - x0 <= high
            patch = image[y0:y1, x0:x1].reshape(-1, 3).astype(int)
            strongest = patch[patch.max(axis=1).argmax()]  # ink is brighter than any background
            nearest = min(drawing.RGB, key=lambda c: np.abs(strongest - drawing.RGB[c]).sum())
            assert nearest == thing.color


def test_records_hold_what_was_drawn(folder):
    for split, size in SIZES.items():
        source = prepared.TfdsSource(folder, split)
        assert len(source) == size
        for record in source:
            scene = world.scene_from_json(record["scene"])
            unseen = any((t.digit, t.color) in world.UNSEEN_COMBINATIONS for t in scene)
            assert unseen == (split == "held_out")
            assert len(record["captions"]) == dataset.CAPTIONS
            assert all(world.facts_correct(text, scene) for text in record["captions"])
            assert {q["type"] for q in record["questions"]} == set(world.QUESTION_TYPES)
            assert transforms.decode_image(record["image"]).size == (drawing.SIZE, drawing.SIZE)


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    prepare.write(tmp_path / "again", 0, SIZES)
    prepare.write(tmp_path / "other", 1, SIZES)

    def shards(where):
        return {p.name: p.read_bytes() for p in where.rglob("*array_record*")}

    assert len(shards(folder)) == 3
    assert shards(folder) == shards(tmp_path / "again")
    assert shards(folder) != shards(tmp_path / "other")


def test_a_finished_folder_is_left_alone_and_other_settings_are_refused(folder, capsys):
    before = (folder / prepare.PREPARED).stat().st_mtime_ns
    assert prepare.write(folder, 0, SIZES) == 0
    assert "prepared before" in capsys.readouterr().out
    assert (folder / prepare.PREPARED).stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="other data"):
        prepare.write(folder, 5, SIZES)


@pytest.mark.integration
def test_a_killed_preparation_is_made_anew(folder, tmp_path):
    """What a kill leaves behind is a draft folder beside the place, never half of the place."""
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True).stdout.strip()  # fmt: skip
    left = tmp_path / f".d.{dead}@{socket.gethostname()}.partial"
    shutil.copytree(folder, left)
    (left / prepare.PREPARED).unlink()
    (tmp_path / "d.partial").mkdir()  # somebody's
    assert prepare.write(tmp_path / "d", 0, SIZES) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "d.partial"]
    assert len(prepared.TfdsSource(tmp_path / "d", "train")) == 12


def test_a_folder_with_something_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="not empty"):
        prepare.write(tmp_path, 0, SIZES)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_missing_data_says_how_to_make_it(folder, tmp_path):
    with pytest.raises(ValueError, match="blip2 prepare --source=digits"):
        prepared.TfdsSource(tmp_path, "train")
    with pytest.raises(ValueError, match="train, test, held_out"):
        prepared.TfdsSource(folder, "validation")


def test_patches_belong_to_the_box_that_covers_most_of_them():
    owners = patches.patch_owners(json.dumps([[0, 0, 16, 16], [32, 36, 48, 52]]), 8).reshape(8, 8)
    assert (owners[:2, :2] == 0).all() and (owners == 0).sum() == 4
    # The second box covers half of column 4's patches (not more), all of column 5's.
    assert (owners[4:6, 5] == 1).all() and (owners == 1).sum() == 2
