"""Lists as people have them, and the published data sets' own files."""

import json

import numpy as np
import pytest

import tests.data.made as made
from blip2_jax.data import datasets, lists, mixtures, sources
from blip2_jax.data.faults import RecordError


@pytest.fixture
def folder(tmp_path):
    made.write_images(tmp_path / "images", 4)
    return tmp_path


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


ROWS = [{"image": f"{n}.jpg", "caption": f"picture {n}"} for n in range(3)]


def contents(folder, name):
    """The same three pairs in every format."""
    import pyarrow
    import pyarrow.parquet

    path = folder / name
    if name.endswith(".json"):
        write(path, ROWS)
    elif name.endswith(".jsonl"):
        write(path, "\n".join(map(json.dumps, ROWS)) + "\n\n")
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        mark = "\t" if name.endswith(".tsv") else ","
        rows = [f'"picture {n}"{mark}{n}.jpg' for n in range(3)]
        write(path, "\n".join([f"caption{mark}image", *rows]))
    return str(path)


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.csv", "x.tsv", "x.parquet"])
def test_every_format_gives_the_same_records(folder, name):
    source = sources.open_files(contents(folder, name), images=str(folder / "images"))
    assert len(source) == 3
    for number, record in enumerate(source):
        assert record["captions"] == [f"picture {number}"]
        assert record["image"] == made.jpeg(number)
        assert source.where(number).endswith(f"images/{number}.jpg")


def test_bad_rows_are_counted_and_the_others_read(folder):
    lines = [
        json.dumps({"image": "0.jpg", "caption": "fine"}).encode(),
        b'{"image": "1.jpg", "caption": "caf\xe9"}',
        b"{broken",
        b"[1, 2]",
        json.dumps({"caption": "of nothing"}).encode(),
        json.dumps({"image": "2.jpg", "caption": "   "}).encode(),
    ]
    (folder / "x.jsonl").write_bytes(b"\n".join(lines))
    source = lists.ListSource([str(folder / "x.jsonl")], str(folder / "images"))
    assert len(source) == 1
    assert source.faults.by_reason == {
        "not UTF-8": 1, "not JSON": 1, "not a JSON object": 1, "no image named": 1,
        "empty caption": 1,
    }  # fmt: skip
    assert source.faults.examples["not UTF-8"] == [f"{folder}/x.jsonl:2"]
    table = b"image,caption\n0.jpg,fine\n1.jpg,caf\xe9\n2.jpg\n"
    (folder / "x.csv").write_bytes(table)
    source = lists.ListSource([str(folder / "x.csv")], str(folder / "images"))
    assert source.faults.by_reason == {"not UTF-8": 1, "wrong number of columns": 1}


def test_files_that_are_wrong_as_a_whole_say_so(folder):
    for name, value, message in [
        ("a.json", '{"image": 1} {"image": 2}', "not JSON: Extra data"),
        ("b.json", "3", "a list of rows"),
        ("c.json", '{"x": 1}', "none of the known layouts"),
        ("d.json", "[]", "not one row"),
        ("e.csv", "1.jpg,a cat\n2.jpg,a dog\n", "no column that is known.*first line"),
        ("f.parquet", "text", "not readable Parquet"),
        ("g.xls", "text", "no such file|lists end in"),
    ]:
        path = write(folder / name, value)
        with pytest.raises(ValueError, match=message):
            lists.ListSource([path], str(folder / "images"))


def test_a_record_an_image_a_caption_or_a_question(folder):
    rows = [
        {"image": "0.jpg", "caption": "a", "image_id": "coco_1"},
        {"image": "1.jpg", "caption": ["b", "c"]},
        {"image": "0.jpg", "caption": "d"},
        {"image": "1.jpg", "question": "What?", "answer": ["x", "y"], "question_id": 5},
        {"image": "1.jpg", "question": "Again?", "answer": "x", "question_id": 5},
    ]
    path = write(folder / "x.json", rows)

    def read(form):
        return lists.ListSource([path], str(folder / "images"), form=form)

    assert [r["captions"] for r in read("image")] == [["a", "d"], ["b", "c"]]
    captions = list(read("caption"))
    assert [r["captions"] for r in captions] == [["a"], ["d"], ["b"], ["c"]]
    assert [r["image_number"] for r in captions] == [0, 0, 1, 1]
    (question,) = read("question")
    asked = {"question": "What?", "answers": ["x", "y"], "question_id": 5}
    assert question["questions"] == [asked] and question["image_number"] == 1
    assert read("image").faults.by_reason == {"duplicated key": 1}


def test_paths_stay_inside_the_image_folder(folder):
    write(folder / "secret.jpg", "x")
    images = ["../secret.jpg", "/etc/passwd", "sub/../../secret.jpg", "0.jpg"]
    path = write(folder / "x.json", [{"image": i, "caption": "a"} for i in images])
    source = lists.ListSource([path], str(folder / "images"))
    for position in range(3):
        with pytest.raises(RecordError, match="leaves the image folder"):
            source[position]
    assert source[3]["image"] == made.jpeg(0)


def test_missing_and_empty_images_are_said(folder):
    (folder / "images" / "e.jpg").touch()
    path = write(folder / "x.json", [{"image": i, "caption": "a"} for i in ("none.jpg", "e.jpg")])
    source = lists.ListSource([path], str(folder / "images"))
    for position, reason in enumerate(["no such file", "empty file"]):
        with pytest.raises(RecordError) as error:
            source[position]
        assert error.value.reason == reason
        assert error.value.where == source.where(position)


def test_packed_rows_cost_what_their_text_does():
    rows = [{"image": f"train2014/{n:012d}.jpg", "captions": ["a cat"]} for n in range(10_000)]
    packed = lists.Packed(rows)
    assert packed[9_999] == rows[-1] and len(packed) == 10_000
    assert len(packed._data) + packed._ends.nbytes < 90 * len(packed)


# ------------------------------------------------------------------------ published data sets

LAVIS_TRAIN = [
    {"image": "val2014/a.jpg", "caption": "one", "image_id": "coco_1"},
    {"image": "val2014/a.jpg", "caption": "two", "image_id": "coco_1"},
    {"image": "train2014/b.jpg", "caption": "three", "image_id": "coco_2"},
]
KARPATHY = {
    "images": [
        {"filename": "a.jpg", "filepath": "val2014", "cocoid": 1, "split": "restval",
         "sentences": [{"raw": "one"}, {"raw": "two"}]},
        {"filename": "b.jpg", "filepath": "train2014", "cocoid": 2, "split": "train",
         "sentences": [{"raw": "three"}]},
        {"filename": "c.jpg", "filepath": "val2014", "cocoid": 3, "split": "test",
         "sentences": [{"raw": "four"}]},
    ]
}  # fmt: skip


def records(folder, name, split, files, images, **options):
    for path, value in files.items():
        write(folder / path, value)
    for number, image in enumerate(images):
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        (folder / image).write_bytes(made.jpeg(number))
    return list(datasets.open_dataset(name, str(folder), split, **options))


def test_coco_in_karpathys_lavis_and_its_own_form(tmp_path):
    images = ("images/val2014/a.jpg", "images/train2014/b.jpg", "images/val2014/c.jpg")
    k = records(tmp_path / "k", "coco", "train", {"dataset_coco.json": KARPATHY}, images)
    name = "annotations/coco_karpathy_train.json"
    lavis = records(tmp_path / "l", "coco", "train", {name: LAVIS_TRAIN}, images)
    assert (
        [r["captions"] for r in k] == [r["captions"] for r in lavis] == [["one", "two"], ["three"]]
    )
    assert [r["image"] for r in k] == [r["image"] for r in lavis]
    (test,) = datasets.open_dataset("coco", str(tmp_path / "k"), "test")
    assert test["captions"] == ["four"]
    own = {
        "images": [{"id": 9, "file_name": "9.jpg"}],
        "annotations": [{"image_id": 9, "caption": "x", "id": 1}],
    }
    files = {"annotations/captions_train2017.json": own}
    (found,) = records(tmp_path / "o", "coco", "train2017", files, ["train2017/9.jpg"])
    assert found["captions"] == ["x"] and found["id"] == "9"
    with pytest.raises(ValueError, match="dataset_coco.json, coco_karpathy_val.json"):
        datasets.open_dataset("coco", str(tmp_path / "o"), "val")


def test_vqa_questions_meet_their_annotations(tmp_path):
    questions = {"questions": [{"image_id": 42, "question": "Is it?", "question_id": 420}]}
    answers = [{"answer": "yes", "answer_id": n} for n in range(10)]
    annotations = {
        "annotations": [{"question_id": 420, "answer_type": "yes/no", "answers": answers}]
    }
    for name, prefix in (("vqav2", "v2_"), ("okvqa", "")):
        files = {
            f"{prefix}OpenEnded_mscoco_val2014_questions.json": questions,
            f"{prefix}mscoco_val2014_annotations.json": annotations,
        }
        image = "val2014/COCO_val2014_000000000042.jpg"
        (record,) = records(tmp_path / name, name, "val", files, [image], form="question")
        (question,) = record["questions"]
        assert question["answers"] == ["yes"] * 10 and question["answer_type"] == "yes/no"
    files = {"v2_OpenEnded_mscoco_test-dev2015_questions.json": questions}
    image = "test2015/COCO_test2015_000000000042.jpg"
    (record,) = records(tmp_path / "t", "vqav2", "test-dev", files, [image])
    assert record["questions"][0]["answers"] == []


def test_gqa_as_a_dict_and_in_ten_parts(tmp_path):
    question = {"question": "What?", "answer": "dog", "imageId": "7", "fullAnswer": "A dog."}
    files = {"testdev_balanced_questions.json": {"q1": question, "q2": question}}
    (record,) = records(tmp_path / "a", "gqa", "testdev_balanced", files, ["images/7.jpg"])
    assert [q["question_id"] for q in record["questions"]] == ["q1", "q2"]
    assert record["questions"][0]["full_answer"] == "A dog."
    files = {
        f"train_all_questions/train_all_questions_{n}.json": {f"q{n}": question} for n in range(3)
    }
    (record,) = records(tmp_path / "b", "gqa", "train_all", files, ["images/7.jpg"])
    assert len(record["questions"]) == 3


def test_visual_genome_has_two_image_folders(tmp_path):
    files = {
        "image_data.json": [
            {"image_id": n, "url": f"https://host/rak/{place}/{n}.jpg"}
            for n, place in enumerate(("VG_100K", "VG_100K_2"))
        ],
        "region_descriptions.json": [
            {"id": n, "regions": [{"phrase": f"thing {n}"}, {"phrase": "sky"}]} for n in range(2)
        ],
        "question_answers.json": [
            {"id": 1, "qas": [{"question": "Where?", "answer": "Here.", "qa_id": 3}]}
        ],
    }
    images = ("VG_100K/0.jpg", "VG_100K_2/1.jpg")
    found = records(tmp_path, "vg", "train", files, images)
    assert [r["captions"] for r in found] == [["thing 0", "sky"], ["thing 1", "sky"]]
    (question,) = datasets.open_dataset("vg_qa", str(tmp_path), "train")
    assert question["questions"][0]["answers"] == ["Here."]


def test_nocaps_flickr_and_web_pairs(tmp_path):
    nocaps = {
        "images": [{"id": 3, "file_name": "a.jpg", "domain": "out-domain"}],
        "annotations": [{"image_id": 3, "caption": f"c{n}"} for n in range(10)],
    }
    files = {"nocaps_val_4500_captions.json": nocaps}
    (record,) = records(tmp_path / "n", "nocaps", "val", files, ["images/a.jpg"])
    assert len(record["captions"]) == 10 and record["domain"] == "out-domain"
    token = '1.jpg#0\tA man .\n1.jpg#1\tA person "there" .\n2.jpg#0\tA dog .\n'
    files = {"results_20130124.token": token}
    images = ["flickr30k-images/1.jpg", "flickr30k-images/2.jpg"]
    found = records(tmp_path / "f", "flickr30k", "train", files, images)
    assert [len(r["captions"]) for r in found] == [2, 1]
    (tmp_path / "cc3m").mkdir()
    made.write_shards(tmp_path / "cc3m", 2, 2)
    assert len(datasets.open_dataset("cc3m", str(tmp_path / "cc3m"), "train")) == 4


# ----------------------------------------------------------------------------------- mixtures


def test_mixtures_weigh_by_weight_size_or_root_of_size():
    parts = {"a": made.Records(range(900)), "b": made.Records(range(100))}
    weights = {"a": 1.0, "b": 3.0}
    for scheme, expected in [("size", 0.1), ("sqrt_size", 0.25), ("weight", 0.75)]:
        assert mixtures.Mixture(parts, scheme, weights).weights[1] == pytest.approx(expected)
    with pytest.raises(ValueError, match="above 0"):
        mixtures.Mixture(parts, "weight", {"a": 0.0})
    with pytest.raises(ValueError, match="weight, size, sqrt_size"):
        mixtures.Mixture(parts, "chance")


def test_a_mixture_numbers_its_parts_through(folder):
    path = write(folder / "x.json", ROWS)
    part = lists.ListSource([path], str(folder / "images"))
    two = mixtures.Mixture({"a": part, "b": part})
    assert [r["image_number"] for r in two] == list(range(6))
    assert two[4]["captions"] == part[1]["captions"] and two.where(4) == part.where(1)
    assert np.sum(two.weights) == 1


def test_a_source_is_known_by_what_it_holds_not_where(tmp_path):
    def shards(name, count, records=2):
        (tmp_path / name).mkdir()
        made.write_shards(tmp_path / name, count, records)
        return sources.open_files(str(tmp_path / name)).identity()

    first = shards("a", 3)
    assert first == shards("b", 3) and first["records"] == 6
    assert first != shards("c", 2, 3)  # as many records, in other archives
    rows = [{"image": f"{n}.jpg", "caption": "a"} for n in range(3)]
    one, two = (lists.ListSource(iter(r), "x") for r in (rows, [*rows[:2], rows[0]]))
    assert one.identity() != two.identity()
    mixed = mixtures.Mixture({"one": one, "two": two}).identity()
    assert mixed["one"]["records"] == 3 and mixed["one"]["weight"] == 0.6
