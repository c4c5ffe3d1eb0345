"""Preparing what people have: all of it or counted, whole shards or none, the same ones after a
kill."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tests.data.made as made
from blip2_jax import prepare
from blip2_jax.data import capfilt, prepared, shards, sources, transforms
from blip2_jax.data.prepared import PREPARED

ROOT = Path(__file__).parent.parent


def run(*words, workers=0):
    return prepare.main([*words, f"--workers={workers}"])


def pairs(folder, out, *words, **options):
    return run("--source=files", f"--dir={folder}", f"--out={out}", *words, **options)


def shard_bytes(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.array_record-*"))}


@pytest.fixture
def web(tmp_path):
    """Three tars of 20 pairs; the second is cut short, some images are none, a key is twice."""
    folder = tmp_path / "web"
    folder.mkdir()
    _, cut, odd = made.write_shards(folder, 3, 20)
    whole = open(cut, "rb").read()
    open(cut, "wb").write(whole[:30_000])
    made.write_tar(
        odd,
        [
            *made.members("new", 90, "a new one"),
            *made.members("000000004", 91, "a key of the first tar"),
            ("bad.jpg", b"<html>"), ("bad.txt", b"none"),
            ("half.jpg", made.jpeg(3, (200, 200))[:1000]), ("half.txt", b"half"),
        ],
    )  # fmt: skip
    return folder


@pytest.mark.integration
def test_everything_is_there_or_counted(web, tmp_path, capsys):
    out = tmp_path / "out"
    assert pairs(web, out, "--records_per_shard=7", workers=2) == 0
    said = capsys.readouterr().out
    assert "Skipped 4 of 32 records" in said and "1 x duplicated key" in said
    before = sources.open_files(str(web))
    after = sources.open_files(str(out), split="train")
    known = {record["id"]: record for n, record in enumerate(before) if n != len(before) - 3}
    assert len(after) == 28 == len(shards_of(out)["ids"])
    for record in after:  # the same bytes, texts and all else
        expected = known[record["id"]]
        assert {k: v for k, v in record.items() if k != "image_number"} == expected


def shards_of(out):
    notes = [json.loads(path.read_text()) for path in sorted((out / "shards").glob("*.json"))]
    return {"ids": [i for note in notes for i in range(note["records"])], "notes": notes}


def test_the_card_and_the_page_say_what_is_in_it(web, tmp_path):
    out = tmp_path / "out"
    pairs(web, out)
    text, page = (out / "README.md").read_text(), (out / "report.html").read_text()
    assert "| train | 28 | 28 | 0 |" in text and "| not a readable image | 1 |" in text
    assert "words of a caption" in page and page.count("data:image/jpeg;base64,") == 3
    assert "http://" not in page.replace("http://www.w3.org", "")  # nothing beside it is needed
    done = json.loads((out / prepare.PREPARED).read_text())
    train = done["splits"]["train"]
    assert train["totals"]["records"] == 28 and sum(train["lengths"]) == 28
    assert sum(train["bins"]["width (pixels)"].values()) == 28


def test_texts_cannot_break_the_page(tmp_path):
    made.write_images(tmp_path / "images", 1)
    rows = [{"image": "0.jpg", "caption": "<script>alert(1)</script>"}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    pairs(tmp_path / "x.json", tmp_path / "out", f"--images={tmp_path / 'images'}")
    assert "<script>" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.integration
def test_a_killed_run_goes_on_with_what_is_missing(web, tmp_path):
    """kill -9 in the middle: what is finished is not written again, and the end is the same."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    words = ["--source=files", f"--dir={web}", "--records_per_shard=4", "--workers=0"]
    event = "blip2_jax.data.shards.transforms.decode_image:14:SIGKILL"  # in the fourth shard
    code = f"from tests import interrupted; interrupted.plant({event!r})\n"
    code += f"from blip2_jax import prepare; prepare.main({[*words, f'--out={out}']})"
    killed = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = {path.name: path.stat().st_mtime_ns for path in out.glob("*.array_record-*")}
    finished = {name for name in left if not name.endswith(".partial")}
    assert len(finished) == 3 and len(left) == 4
    assert not prepared.is_prepared(str(out))
    assert prepare.main([*words, f"--out={out}"]) == 0
    assert not list(out.glob("*.partial"))
    for name in finished:
        assert (out / name).stat().st_mtime_ns == left[name]
    prepare.main([*words, f"--out={whole}"])
    assert shard_bytes(out) == shard_bytes(whole)
    assert (out / "README.md").read_text() == (whole / "README.md").read_text()


@pytest.mark.integration
def test_processes_write_what_one_would(web, tmp_path):
    for workers in (0, 3):
        pairs(web, tmp_path / str(workers), "--records_per_shard=5", workers=workers)
    assert shard_bytes(tmp_path / "0") == shard_bytes(tmp_path / "3")


def test_splits_share_a_folder_and_finished_ones_are_left_alone(web, tmp_path, capsys):
    out = tmp_path / "out"
    pairs(web, out)
    one = tmp_path / "one"
    one.mkdir()
    made.write_shards(one, 1, 3)
    pairs(one, out, "--split=test")
    assert [len(prepared.TfdsSource(out, split)) for split in ("train", "test")] == [28, 3]
    before = shard_bytes(out)
    assert pairs(one, out, "--split=test") == 0
    assert "prepared before" in capsys.readouterr().out and shard_bytes(out) == before
    with pytest.raises(SystemExit, match="holds another 'test'"):
        pairs(web, out, "--split=test")


def test_folders_with_something_else_are_not_touched(web, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="not empty and not ours"):
        pairs(web, tmp_path / "mine")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / PREPARED).write_text('{"source": "digits", "seed": 0}')
    with pytest.raises(SystemExit, match="other data"):
        pairs(web, tmp_path / "d")
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]
    pairs(web, tmp_path / "out")
    (tmp_path / "out/README.md").write_text("what I found out about this data")
    with pytest.raises(SystemExit, match=r"blip2 prepare would write, .*README\.md"):
        pairs(web, tmp_path / "out", "--split=test")
    assert (tmp_path / "out/README.md").read_text() == "what I found out about this data"


def test_checking_writes_nothing(web, tmp_path, capsys):
    before = sorted(os.listdir(tmp_path))
    assert run("--source=files", f"--dir={web}", "--check") == 1
    said = capsys.readouterr().out
    assert "usable: 28 train records" in said and "1 x not a readable image: damaged" in said
    assert sorted(os.listdir(tmp_path)) == before
    good = tmp_path / "good"
    good.mkdir()
    made.write_shards(good, 1, 3)
    assert run("--source=files", f"--dir={good}", "--check") == 0


def test_the_sum_of_a_lists_rows_is_said(tmp_path, capsys):
    made.write_images(tmp_path, 3)
    rows = ["image,caption,split", "0.jpg,one,train", "0.jpg,two,train", "1.jpg,,train"]
    rows += ['2.jpg,"open,train', "2.jpg,three,test", "nothing.jpg,four,train"]
    (tmp_path / "x.csv").write_text("\n".join(rows))
    words = ["--source=files", f"--dir={tmp_path}/x.csv", "--check"]
    assert run(*words, "--max_skipped=1") == 1
    said = capsys.readouterr().out
    assert "x.csv: 5 rows read (and 1 of other splits) = 3 used + 2 skipped" in said
    assert "make 2 records" in said and "usable: 1 train records" in said
    assert "1 x quote that is not closed: " in said and "1 x no such file: " in said
    with pytest.raises(SystemExit, match="no split 'val'; there are test, train"):
        run(*words, "--split=val")


@pytest.mark.integration
def test_columns_are_named_and_images_in_parquet_prepared(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"picture": [made.jpeg(n) for n in range(3)], "said": ["a", "b\nb", "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    columns = "--columns=image=picture,caption=said"
    pairs(tmp_path / "x.parquet", tmp_path / "out", columns, workers=2)
    found = list(prepared.TfdsSource(tmp_path / "out", "train"))
    assert [r["captions"] for r in found] == [["a"], ["b\nb"], ["c"]]
    assert [r["image"] for r in found] == [made.jpeg(n) for n in range(3)]
    with pytest.raises(SystemExit, match="holds another 'train'"):
        pairs(tmp_path / "x.parquet", tmp_path / "out", "--columns=image=picture,caption=x")


def test_transparent_images_that_are_made_smaller_get_a_background(tmp_path):
    Image.new("RGBA", (90, 60), (0, 0, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "x.json").write_text(json.dumps([{"image": "a.png", "caption": "nothing"}]))
    for color, expected in (("white", 255), ("drop", 0)):
        words = [f"--alpha_background={color}", "--shorter_side=30"]
        pairs(tmp_path / "x.json", tmp_path / color, *words)
        (record,) = prepared.TfdsSource(tmp_path / color, "train")
        assert transforms.decode_image(record["image"]).getpixel((3, 3)) == (expected,) * 3
    with pytest.raises(SystemExit, match="alpha_background is 'whit'"):
        pairs(tmp_path / "x.json", tmp_path / "x", "--alpha_background=whit")


def test_too_much_that_is_broken_stops_it(web, tmp_path):
    with pytest.raises(SystemExit, match="more than the share of 0.05.*\n.*x "):
        pairs(web, tmp_path / "out", "--max_skipped=0.05")
    assert not prepared.is_prepared(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source=files", "--out=x"], "needs --dir"),
        (["--source=files", "--dir=nowhere"], "--out"),
        (["--source=files", "--dir=nowhere", "--out=x"], "nowhere: no such file"),
        (["--source=coco", "--dir=nowhere", "--out=x"], "holds no coco"),
        (["--source=files", "--dir=x", "--out=x", "--records_per_shard=0"], "at least 1"),
        (["--source=files", "--dir=x", "--out=x", "--capfilt"], "no such file"),
    ],
)
def test_mistakes_are_said_before_any_work(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        run(*words)


@pytest.mark.parametrize("missing", ["blip2_jax.digits", "sklearn"])
def test_a_library_that_is_missing_is_named_and_a_source_that_is_not_there_left_out(
    missing, monkeypatch
):
    def fail(name):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(prepare, "import_module", fail)
    if missing == "sklearn":
        with pytest.raises(ModuleNotFoundError, match="sklearn"):
            prepare._others()
    else:
        assert prepare._others() == {}


def test_large_images_are_made_smaller_and_small_ones_kept(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(made.jpeg(1, (300, 200)))
    (tmp_path / "images" / "b.jpg").write_bytes(made.jpeg(2, (90, 60)))
    rows = [{"image": f"{name}.jpg", "caption": "a picture"} for name in "ab"]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    out = tmp_path / "out"
    pairs(tmp_path / "x.json", out, f"--images={tmp_path / 'images'}", "--shorter_side=100")
    large, small = prepared.TfdsSource(out, "train")
    assert transforms.decode_image(large["image"]).size == (150, 100)
    assert small["image"] == made.jpeg(2, (90, 60))


def test_a_shard_without_a_usable_record_is_no_obstacle(tmp_path):
    names = made.write_images(tmp_path / "images", 6)
    for name in names[2:4]:
        (tmp_path / "images" / name).write_bytes(b"x")
    rows = [{"image": name, "caption": name} for name in names]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    out = tmp_path / "out"
    words = [f"--images={tmp_path / 'images'}", "--records_per_shard=2"]
    pairs(tmp_path / "x.json", out, *words)
    assert [record["captions"] for record in prepared.TfdsSource(out, "train")] == [
        ["0.jpg"], ["1.jpg"], ["4.jpg"], ["5.jpg"],
    ]  # fmt: skip


def test_questions_and_captions_of_an_image_come_through(tmp_path):
    made.write_images(tmp_path / "images", 1)
    rows = [
        {"image": "0.jpg", "caption": "one", "image_id": 7},
        {"image": "0.jpg", "question": "What?", "answer": ["a", "b"], "question_id": 1},
        {"image": "0.jpg", "caption": "two"},
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    words = (tmp_path / "x.json", tmp_path / "out", f"--images={tmp_path / 'images'}")
    pairs(*words)
    (record,) = prepared.TfdsSource(tmp_path / "out", "train")
    assert record["captions"] == ["one", "two"] and record["id"] == "7"
    assert record["questions"] == [{"question": "What?", "answers": ["a", "b"], "question_id": 1}]
    pairs(words[0], tmp_path / "each", words[2], "--form=caption")
    each = prepared.TfdsSource(tmp_path / "each", "train")
    assert [r["captions"] for r in each] == [["one"], ["two"]]
    assert [r["image_number"] for r in each] == [0, 0] and each.image_numbers == 1


def test_remote_folders_are_written_and_read(web, tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("BLIP2_CACHE", str(tmp_path / "cache"))
    pairs(web, "memory://bucket/out", "--records_per_shard=10")
    pairs(web, tmp_path / "out", "--records_per_shard=10")
    remote = sources.open_files("memory://bucket/out", split="train")
    assert list(remote) == list(prepared.TfdsSource(tmp_path / "out", "train"))
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_training_reads_what_was_prepared(web, tmp_path):
    from tests.data import test_faults

    pairs(web, tmp_path / "out")
    config = test_faults.make_config(**{"data.source": "tfds", "data.dir": str(tmp_path / "out")})
    batches, skipped = test_faults.take(config, 4)
    assert skipped.count == 0 and batches[0]["image"].shape == (8, 16, 16, 3)


# ------------------------------------------------------------------------------------- CapFilt


def brightness(images):
    return images.reshape(len(images), -1).mean(axis=1)


def caption(images):
    """Three captions an image, one of them right."""
    return [["bright 0", f"bright {value:.0f}", "Bright 0!"] for value in brightness(images)]


def similarity(images, texts):
    """Higher the nearer the number in the text is to the image's brightness."""
    last = [text.split()[-1].strip("!") for text in texts]
    said = np.array([float(word) if word.isdigit() else 1000 for word in last])
    return -np.abs(brightness(images)[:, None] - said[None])


def test_capfilt_keeps_the_captions_that_fit_best():
    images = [Image.new("RGB", (8, 8), (value,) * 3) for value in (10, 100, 200)]
    records = [
        {"id": "a", "captions": ["a wrong 250"]},
        {"id": "b", "captions": ["nearly 101"], "url": "kept"},
        {"id": "c", "captions": []},
    ]
    tool = capfilt.CapFilt(caption, similarity, keep=2, batch_size=2)
    a, b, c = tool(images, records)
    assert a["captions"] == ["bright 10", "bright 0"]  # "Bright 0!" is the same when cleaned
    assert b["captions"] == ["bright 100", "nearly 101"] and b["url"] == "kept"
    assert c["captions"] == ["bright 200", "bright 0"] and c["scores"] == [0.0, -200.0]


def test_capfilt_writes_shards_that_training_reads(web, tmp_path):
    source = sources.open_files(str(web))
    args = prepare.cli.parse(
        "", ["--source=files", f"--out={tmp_path / 'out'}"], prepare.add_arguments, config=False
    )
    plan = prepare.make_plan(args, source)
    tool = capfilt.CapFilt(caption, similarity, keep=1)
    (tmp_path / "out" / "shards").mkdir(parents=True)
    found = shards.write_all(source, plan, workers=0, max_skipped=0.5, captions=tool)
    shards.write_metadata(plan, "", {"train": (found["lengths"], 0)})
    for record in prepared.TfdsSource(tmp_path / "out", "train"):
        pixels = transforms.resize(transforms.decode_image(record["image"]), 224)
        assert record["captions"] == [f"bright {pixels.mean():.0f}"]
        assert abs(record["scores"][0]) <= 0.51


def test_loaded_models_take_part_through_two_methods():
    class Model:
        def caption(self, images, *, num_return_sequences, do_sample, num_beams, top_p):
            assert do_sample and num_beams == 1 and top_p == 0.9
            said = [[f"{i} {n}" for n in range(num_return_sequences)] for i in range(len(images))]
            return said if num_return_sequences > 1 else [texts[0] for texts in said]

        def similarity(self, images, texts):
            return np.zeros((len(images), len(texts)))

    images = np.zeros((2, 4, 4, 3), np.uint8)
    assert capfilt.caption_by(Model(), 2)(images) == [["0 0", "0 1"], ["1 0", "1 1"]]
    assert capfilt.caption_by(Model(), 1)(images) == [["0 0"], ["1 0"]]
    assert capfilt.similarity_by(Model())(images, ("a",)).shape == (2, 1)
