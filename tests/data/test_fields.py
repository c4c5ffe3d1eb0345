"""Rows as people have them: every one is understood the same way, or counted with its reason."""

import json

import numpy as np
import pytest

import tests.data.made as made
from blip2_jax.data import datasets, folders, lists, prepared, sources
from blip2_jax.data.columns import Columns, is_missing
from blip2_jax.data.faults import RecordError


def write(path, value):
    """A list as a file: text, bytes, or JSON of anything else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = value if isinstance(value, (str, bytes)) else json.dumps(value)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def read(path, value, **options):
    source = lists.ListSource([write(path, value)], **options)
    assert source.counts.read == source.counts.used + source.counts.skipped
    assert source.faults.count == source.counts.skipped
    return source


def captions(source):
    return [source.without_image(n)["captions"] for n in range(len(source))]


def questions(source):
    return [q for n in range(len(source)) for q in source.without_image(n).get("questions", [])]


# ----------------------------------------------------------------------------------------- quotes


def table(rows, delimiter=","):
    return "\n".join([f"image{delimiter}caption", *rows])


@pytest.mark.parametrize("count", [1, 5000])
def test_a_quote_that_is_not_closed_costs_its_own_row(tmp_path, count):
    rows = [f"{n}.jpg,picture {n}" for n in range(count)]
    rows.insert(0, '"x.jpg,a runaway')
    rows.insert(count // 2 + 1, 'y.jpg,"another')
    source = read(tmp_path / "x.csv", table(rows))
    assert captions(source) == [[f"picture {n}"] for n in range(count)]
    assert source.counts.read == count + 2
    assert source.faults.by_reason == {"quote that is not closed": 2}
    assert source.faults.examples["quote that is not closed"][0] == f"{tmp_path}/x.csv:2"


def test_two_open_quotes_join_no_rows(tmp_path):
    rows = ['0.jpg,"a cat', '1.jpg,a dog"', "2.jpg,a bird", '3.jpg,"one, two', '4.jpg,three, four"']
    source = read(tmp_path / "x.csv", table(rows))
    assert captions(source) == [['a dog"'], ["a bird"]]
    assert source.faults.by_reason == {"quote that is not closed": 2, "wrong number of columns": 1}
    reverse = "caption,image\n" + "\n".join(['"a cat,0.jpg', 'a dog",1.jpg', "a bird,2.jpg"])
    assert captions(read(tmp_path / "y.csv", reverse)) == [['a dog"'], ["a bird"]]


def test_captions_over_several_lines_stay_one_row(tmp_path):
    rows = ['0.jpg,"a cat,\non a mat, asleep"', '1.jpg,"the ""big"" one"', '2.jpg,"STOP" sign']
    expected = [["a cat,\non a mat, asleep"], ['the "big" one'], ["STOP sign"]]
    assert captions(read(tmp_path / "x.csv", table(rows))) == expected
    ends = table(rows).replace("\n2.jpg", "\r2.jpg").replace("\n1.jpg", "\r\n1.jpg")
    assert captions(read(tmp_path / "y.csv", ends)) == expected


def test_tabs_and_bars_know_no_quotes(tmp_path):
    for suffix, delimiter in ((".tsv", "\t"), (".csv", "|"), (".csv", "\t")):
        rows = [f'0.jpg{delimiter}a "cat', f'1.jpg{delimiter}"a dog', f'2.jpg{delimiter}a bird"']
        source = read(tmp_path / f"x{suffix}", table(rows, delimiter))
        assert captions(source) == [['a "cat'], ['"a dog'], ['a bird"']]
    source = read(tmp_path / "y.tsv", table(['0.jpg\t"a ""cat"""'], "\t"))  # as pandas writes it
    assert captions(source) == [['a "cat"']]


# ----------------------------------------------------------------------------------------- splits

SPLIT = [
    {"image": "0.jpg", "caption": "zero", "split": "train"},
    {"image": "1.jpg", "caption": "one", "split": "Test"},
    {"image": "2.jpg", "caption": "two", "split": "restval"},
    {"image": "3.jpg", "caption": "", "split": "val"},
    {"image": "4.jpg", "caption": "", "split": "train"},
    {"image": "5.jpg", "caption": "five", "split": None},
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow"])
def test_rows_of_other_splits_are_not_read(tmp_path, suffix):
    path = write_as(tmp_path / f"x{suffix}", SPLIT)
    train = lists.ListSource([path], split="train")
    assert captions(train) == [["zero"], ["two"]] and train.by_split
    assert train.counts == lists.Counts(read=4, used=2, skipped=2, other_splits=2)
    assert train.faults.by_reason == {"empty caption": 1, "no split named": 1}
    assert captions(lists.ListSource([path], split="test")) == [["one"]]
    with pytest.raises(ValueError, match="no split 'nosuch'; there are Test, restval, train, val"):
        lists.ListSource([path], split="nosuch")
    with pytest.raises(ValueError, match="not one row"):
        lists.ListSource([path], split="validation")  # which is "val" here, and empty
    assert len(lists.ListSource([path])) == 4  # all
    assert len(lists.ListSource([path], split="x", columns="split=")) == 4


def write_as(path, rows):
    """Rows of texts in any container."""
    import pyarrow
    import pyarrow.parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".json":
        return write(path, rows)
    if path.suffix == ".jsonl":
        return write(path, "\n".join(map(json.dumps, rows)))
    if path.suffix in (".csv", ".tsv"):
        mark = "," if path.suffix == ".csv" else "\t"
        lines = [mark.join(str(row.get(name) or "") for name in names) for row in rows]
        return write(path, "\n".join([mark.join(names), *lines]))
    whole = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(whole, path)
    else:
        new = pyarrow.ipc.new_stream if path.suffix == ".arrow" else pyarrow.ipc.new_file
        with new(str(path), whole.schema) as writer:
            writer.write_table(whole)
    return str(path)


def test_a_folder_with_a_list_a_split_is_read_by_split(tmp_path):
    for split in ("train", "validation", "test"):
        rows = [{"image": f"{split}.jpg", "caption": split}]
        write_as(tmp_path / f"{split}-00000-of-00001.parquet", rows)
    assert captions(sources.open_files(str(tmp_path), split="train")) == [["train"]]
    source = sources.open_files(str(tmp_path), split="val")
    assert captions(source) == [["validation"]] and source.by_split
    assert len(sources.open_files(str(tmp_path))) == 3
    with pytest.raises(ValueError, match="of the split 'x'; there are test, train, validation"):
        sources.open_files(str(tmp_path), split="x")


# ---------------------------------------------------------------------------------------- answers

NO_ANSWER = [None, "", "  ", float("nan"), []]


@pytest.mark.parametrize("key", ["answer", "answers"])
@pytest.mark.parametrize("empty", NO_ANSWER, ids=repr)
def test_an_empty_answer_is_none(tmp_path, key, empty):
    row = {"image": "0.jpg", "question": "What?", "caption": "kept", key: empty}
    source = read(tmp_path / "x.json", [row])
    assert source.without_image(0)["questions"] == [{"question": "What?", "answers": []}]
    assert captions(source) == [["kept"]] and source.notes.by_reason == {"empty answer": 1}


@pytest.mark.parametrize(
    ("value", "answers", "notes"),
    [
        ({"yes": 3, "no": 1}, ["yes"] * 3 + ["no"], {}),
        ({"yes": 0.5}, [], {"answer counts are no whole numbers": 1}),
        ({"yes": 10**9}, [], {"answer counts are no whole numbers": 1}),
        ([{"answer": "a"}, {"answer": None}, None, "b"], ["a", "b"], {"empty answer": 2}),
        ({"answer": ["a", "b"], "answer_id": [1, 2]}, ["a", "b"], {}),
        ('["a", "b"]', ["a", "b"], {}),
        ("['a', 'b']", ["a", "b"], {}),
        ([2, 2.0, 0.5, True], ["2", "2", "0.5"], {"answer is no text": 1}),
        ("None", ["None"], {}),
    ],
    ids=repr,
)
def test_answers_in_all_forms(tmp_path, value, answers, notes):
    source = read(tmp_path / "x.json", [{"image": "0.jpg", "question": "What?", "answers": value}])
    assert source.without_image(0)["questions"] == [{"question": "What?", "answers": answers}]
    assert source.notes.by_reason == notes


# -------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv"])
def test_texts_in_every_unicode_encoding(tmp_path, encoding, suffix):
    rows = [{"image": f"{n}.jpg", "caption": f"ein Bär № {n}"} for n in range(3)]
    path = write_as(tmp_path / f"x{suffix}", rows)
    text = open(path, encoding="utf-8").read()
    if suffix.startswith(".json"):
        text = text.encode().decode("unicode-escape")
    write(tmp_path / f"y{suffix}", text.encode(encoding))
    source = lists.ListSource([f"{tmp_path}/y{suffix}"])
    assert captions(source) == [[row["caption"]] for row in rows] and not source.faults.count


def test_bytes_that_are_no_text_cost_their_rows(tmp_path):
    rows = b'[{"image": "0.jpg", "caption": "caf\xe9"}, {"image": "1.jpg", "caption": "fine"}]'
    source = read(tmp_path / "x.json", rows)
    assert captions(source) == [["fine"]] and source.faults.by_reason == {"not UTF-8": 1}
    half = [{"image": "0.jpg", "caption": "half \ud83d"}, {"image": "1.jpg", "caption": "fine"}]
    assert read(tmp_path / "y.json", half).faults.by_reason == {"not UTF-8": 1}


# -------------------------------------------------------------------------- layouts of annotations


def test_odd_annotations_are_read_or_counted_one_by_one(tmp_path):
    coco = {
        "images": [{"id": "1", "filename": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}, {"id": 3}, 7],
        "annotations": [
            {"image_id": 1, "caption": "one"}, {"caption": "of none"},
            {"image_id": 9, "caption": "x"},
            {"image_id": 2, "caption": None}, {"image_id": "2", "caption": "two"}, None,
            {"image_id": 3, "caption": "no file"},
        ],
    }  # fmt: skip
    source = read(tmp_path / "coco.json", coco)
    assert captions(source) == [["one"], ["two"]] and source.counts.read == 8
    assert source.faults.by_reason == {
        "empty caption": 1, "no image file for its id, key or URL": 1, "image without an id": 1,
        "caption of an image that is not in the list": 1, "caption without an image id": 2,
    }  # fmt: skip
    karpathy = {
        "images": [
            {"filename": "a.jpg", "sentences": [{"tokens": ["a", "cat"]}, {"raw": "A dog."}]},
            {"filename": "b.jpg", "sentences": [{"raw": None}]},
            {"filename": "c.jpg", "sentences": None},
            "odd",
        ]
    }
    source = read(tmp_path / "k.json", karpathy)
    assert captions(source) == [["a cat", "A dog."]]
    assert source.faults.by_reason == {"empty caption": 2, "not a JSON object": 1}
    rows = {"q1": {"image": "0.jpg", "question": "What?"}, "q2": None, "q3": {"image": "1.jpg"}}
    source = read(tmp_path / "gqa.json", rows)
    assert [q["question_id"] for q in questions(source)] == ["q1"]
    assert source.faults.by_reason == {"not a JSON object": 1, "empty caption": 1}


def test_questions_as_texts_and_ids_of_two_types(tmp_path):
    rows = [
        {"image": "0.jpg", "questions": ["What?", "Where?", None]},
        {"image": "1.jpg", "questions": ["What?", "Where?"], "answers": ["this", "here"]},
        {
            "image": "2.jpg",
            "questions": [{"text": "Who?", "answer": "me", "id": 7}, {"answer": "x"}],
        },
        {"image": "3.jpg", "question": 5},
    ]
    source = read(tmp_path / "x.json", rows)
    asked = [(q["question"], q["answers"]) for q in questions(source)]
    assert asked == [
        ("What?", []), ("Where?", []), ("What?", ["this"]), ("Where?", ["here"]), ("Who?", ["me"]),
    ]  # fmt: skip
    assert source.notes.by_reason == {"empty question": 2}
    assert source.faults.by_reason == {"question is no text": 1}
    whole = {
        "questions": [
            {"question_id": "420", "image_id": "42", "question": "Is it?"},
            {"image_id": 1},
        ],
        "annotations": [{"question_id": 420, "image_id": 42, "answers": [{"answer": "yes"}]}],
    }
    for folder, names in (
        ("vqav2", "v2_{}mscoco_val2014_{}.json"),
        ("okvqa", "{}mscoco_val2014_{}.json"),
    ):
        write(tmp_path / folder / names.format("OpenEnded_", "questions"), whole)
        write(tmp_path / folder / names.format("", "annotations"), whole)
        source = datasets.open_dataset(folder, str(tmp_path / folder), "val")
        assert source.without_image(0)["questions"][0]["answers"] == ["yes"]
        assert source.where(0).endswith("val2014/COCO_val2014_000000000042.jpg")
        assert source.faults.by_reason == {"question without an id": 1}


def test_duplicated_ids_are_found_whatever_their_type(tmp_path):
    rows = [
        {"image": "0.jpg", "question": "a", "question_id": 1},
        {"image": "1.jpg", "question": "b", "question_id": "1"},
        {"image": "2.jpg", "questions": [{"question": "c", "id": 2}, {"question": "d", "id": 2.0}]},
    ]
    source = read(tmp_path / "x.json", rows)
    assert [q["question"] for q in questions(source)] == ["a", "c"]
    assert source.faults.by_reason == {"duplicated key": 1}
    assert source.notes.by_reason == {"duplicated question": 1}


# ---------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow"])
def test_columns_can_be_named_and_unknown_ones_are_said(tmp_path, suffix):
    rows = [
        {"photo": "0.jpg", "Was man sieht": "a cat"},
        {"photo": "1.jpg", "Was man sieht": "two"},
    ]
    path = write_as(tmp_path / f"x{suffix}", rows)
    for message in ("x.* has no column .* images or captions", "photo, Was man sieht", "file_name"):
        with pytest.raises(ValueError, match=message):
            lists.ListSource([path])
    with pytest.raises(ValueError, match="hold captions.*--columns caption=COLUMN"):
        lists.ListSource([path], columns="image=photo")
    source = lists.ListSource([path], columns="image=photo, caption=was_man_sieht")
    assert captions(source) == [["a cat"], ["two"]]
    with pytest.raises(ValueError, match="no column 'foto'.*photo, Was.*mean 'photo'"):
        lists.ListSource([path], columns="image=foto,caption=Was man sieht")
    with pytest.raises(ValueError, match="no field 'img'.*known: image, "):
        lists.ListSource([path], columns="img=photo")
    with pytest.raises(ValueError, match="write FIELD=COLUMN"):
        lists.ListSource([path], columns="photo")


LAYOUTS = {
    "open_clip": "filepath,title\n0.jpg,a cat\n",
    "flickr30k, Kaggle": "image_name| comment_number| comment\n0.jpg| 0| a cat\n",
    "flickr30k, hub": 'raw,sentids,split,filename,img_id\n"[""a cat""]",[1],train,0.jpg,7\n',
    "capitals and spaces": "Image Path , CAPTION \n0.jpg, a cat \n",
    "semicolons": 'image;caption\n0.jpg;"a cat"\n',
    "tabs in a .csv": "image\tcaption\n0.jpg\ta cat\n",
    "Excel": "sep=;\nimage;caption;\n0.jpg;a cat;\n",
    "an index": ",image,caption\n0,0.jpg,a cat\n",
    "Windows": "image,caption\r\n.\\0.jpg,a cat\r\n",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_tables_as_they_are_published(tmp_path, name):
    made.write_images(tmp_path, 1)
    source = read(tmp_path / "x.csv", LAYOUTS[name], split="train")
    assert captions(source) == [["a cat"]] and source[0]["image"] == made.jpeg(0)


def test_captions_in_several_columns_of_one_name(tmp_path):
    source = read(tmp_path / "x.csv", "image,caption,caption\n0.jpg,one,two\n1.jpg,three,\n")
    assert captions(source) == [["one", "two"], ["three"]]
    assert source.notes.by_reason == {"empty caption": 1}


JSONS = {
    "LLaVA": [{"image": "0.jpg", "id": "x", "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a cat"},
        {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes"}]}],
    "messages": [{"image": "0.jpg", "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "yes"}]}],
    "TextVQA": {"dataset_name": "textvqa", "data": [
        {"image_id": "0", "question": "What is it?", "answers": ["a cat"], "question_id": 1},
        {"image_id": "0", "question": "Sure?", "answers": ["yes"], "question_id": 2}]},
    "A-OKVQA": [
        {"image_id": 0, "question": "What is it?", "direct_answers": ["a cat"], "split": "train"},
        {"image_id": 0, "question": "Sure?", "choices": ["no", "yes"], "correct_choice_idx": 1,
         "split": "train"}],
    "VizWiz": [
        {"image": "0.jpg", "question": "What is it?", "answers": [{"answer": "a cat"}]},
        {"image": "0.jpg", "question": "Sure?", "answers": [{"answer": "yes"}], "answerable": 1}],
    "pandas": {"image": {"0": "0.jpg", "1": "0.jpg"}, "answer": {"0": "a cat", "1": "yes"},
               "question": {"0": "What is it?", "1": "Sure?"}},
}  # fmt: skip


@pytest.mark.parametrize("name", JSONS)
def test_questions_as_they_are_published(tmp_path, name):
    made.write_images(tmp_path, 1)
    source = read(tmp_path / "x.json", JSONS[name], split="train")
    asked = [(q["question"], q["answers"]) for q in questions(source)]
    assert asked == [("What is it?", ["a cat"]), ("Sure?", ["yes"])]
    assert source[0]["image"] == made.jpeg(0)


def test_published_question_sets_are_known_by_name(tmp_path):
    for name, file, image in (
        ("textvqa", "TextVQA_0.5.1_val.json", "train_images/0.jpg"),
        ("vizwiz", "Annotations/val.json", "val/0.jpg"),
        ("aokvqa", "aokvqa_v1p0_val.json", "val2017/000000000000.jpg"),
    ):
        rows = {"textvqa": "TextVQA", "vizwiz": "VizWiz", "aokvqa": "A-OKVQA"}[name]
        value = json.loads(json.dumps(JSONS[rows]).replace('"train"', '"val"'))
        write(tmp_path / name / file, value)
        write(tmp_path / name / image, made.jpeg(3))
        source = datasets.open_dataset(name, str(tmp_path / name), "val")
        assert len(questions(source)) == 2 and source[0]["image"] == made.jpeg(3)


def test_captions_of_json_objects(tmp_path):
    for n, value in enumerate(
        (
            {"0.jpg": "a cat", "1.jpg": ["a dog"]},
            {"image": ["0.jpg", "1.jpg"], "caption": ["a cat", "a dog"]},
            {"columns": ["image", "caption"], "data": [["0.jpg", "a cat"], ["1.jpg", "a dog"]]},
            '{"image": "0.jpg", "caption": "a cat"}\n{"image": "1.jpg", "caption": "a dog"}\n',
        )
    ):
        assert captions(read(tmp_path / f"{n}.json", value)) == [["a cat"], ["a dog"]]


def test_json_is_known_by_what_is_in_the_file(tmp_path):
    rows = [{"image": "0.jpg", "caption": "a cat"}, {"image": "1.jpg", "caption": "a dog"}]
    source = read(tmp_path / "x.jsonl", json.dumps(rows, indent=1))
    assert captions(source) == [["a cat"], ["a dog"]] and source.counts.read == 2
    lines = '[1]\n{"image": "0.jpg", "caption": "a cat"}'
    assert read(tmp_path / "y.jsonl", lines).faults.by_reason == {"not a JSON object": 1}
    deep = "[" * 100_000
    assert read(tmp_path / "z.jsonl", deep + "\n" + lines).faults.by_reason == {
        "not JSON": 1, "not a JSON object": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match="nested too deeply"):
        lists.ListSource([write(tmp_path / "z.json", deep)])


def test_downloads_are_found_by_key_id_and_url(tmp_path):
    made.write_images(tmp_path / "00000", 3)
    (tmp_path / "00000/1.jpg").rename(tmp_path / "00000/000000001.jpg")
    rows = [
        {"URL": "http://x/0.jpg?size=l", "TEXT": "by url", "key": None, "status": "success"},
        {"URL": "http://x/y", "TEXT": "by key", "key": "000000001", "status": "success"},
        {"URL": "http://x/2.jpg", "TEXT": "failed", "key": "9", "status": "failed_to_download"},
        {"URL": "http://x/none.jpg", "TEXT": "lost", "key": None, "status": None},
        {"URL": None, "TEXT": "of nothing", "key": None, "status": None},
    ]
    write_as(tmp_path / "00000.parquet", rows)
    write(tmp_path / "00000_stats.json", {"count": 5})
    source = sources.open_files(str(tmp_path), split="train")
    assert captions(source) == [["by url"], ["by key"]]
    assert source[0]["image"] == made.jpeg(0) and source[1]["image"] == made.jpeg(1)
    assert source[0]["url"] == "http://x/0.jpg?size=l"
    assert source.faults.by_reason == {
        "not downloaded": 1, "no image file for its id, key or URL": 1, "no image named": 1,
    }  # fmt: skip


# ----------------------------------------------------------------- images in Parquet and in Arrow


def stored_table(count=5, paths=None):
    """As `datasets` writes images: bytes and paths in a struct."""
    import pyarrow

    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    paths = paths or [None] * count
    images = [{"bytes": made.jpeg(n), "path": paths[n]} for n in range(count)]
    images[1]["bytes"] = b""
    return pyarrow.table(
        {
            "image": pyarrow.array(images, kind),
            "caption": [f"picture {n}" if n != 2 else None for n in range(count)],
        }
    )


def check_stored(source):
    assert captions(source) == [["picture 0"], ["picture 1"], ["picture 3"], ["picture 4"]]
    assert source.faults.by_reason == {"empty caption": 1}
    for position in (3, 0, 2, 0):
        assert source[position]["image"] == made.jpeg((0, 1, 3, 4)[position])
    with pytest.raises(RecordError, match="empty file"):
        source[1]
    assert source.where(2).endswith("[3]") and not source.is_missing(2)


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_images_in_parquet(tmp_path, rows):
    import pickle

    import pyarrow.parquet

    path = str(tmp_path / "train-00000-of-00001.parquet")
    pyarrow.parquet.write_table(stored_table(paths=["same.jpg"] * 5), path, row_group_size=rows)
    source = lists.ListSource([path])
    check_stored(source)
    check_stored(pickle.loads(pickle.dumps(source)))
    assert (
        "bytes" not in json.dumps(source.without_image(0))
        and source.without_image(0)["id"] == "same.jpg"
    )


def save_to_disk(folder, table, split=None):
    """What `datasets` 4 leaves: Arrow streams, and what names them."""
    import pyarrow

    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-00002.arrow" for n in range(2)]
    for name, part in zip(names, (table.slice(0, 2), table.slice(2)), strict=True):
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(part)
    files = [{"filename": name} for name in names]
    write(folder / "state.json", {"_data_files": files, "_split": split, "_format_type": None})
    write(folder / "dataset_info.json", {"features": {"image": {"_type": "Image"}}})


def test_folders_that_datasets_saved(tmp_path):
    save_to_disk(tmp_path / "one", stored_table(), split="train")
    source = sources.open_files(str(tmp_path / "one"), split="train")
    assert captions(source) == [["picture 0"], ["picture 1"], ["picture 3"], ["picture 4"]]
    assert source[2]["image"] == made.jpeg(3) and source.where(2).endswith(
        "00001-of-00002.arrow[1]"
    )
    with pytest.raises(ValueError, match="no split 'test'; there is train"):
        sources.open_files(str(tmp_path / "one"), split="test")
    for split in ("train", "test"):
        save_to_disk(tmp_path / "two" / split, stored_table(5 if split == "train" else 4))
    write(tmp_path / "two/dataset_dict.json", {"splits": ["train", "test"]})
    for split, count in (("train", 4), ("test", 3), ("", 7)):
        assert len(sources.open_files(str(tmp_path / "two"), split=split)) == count
    with pytest.raises(ValueError, match="no split 'val'; there are train, test"):
        sources.open_files(str(tmp_path / "two"), split="val")
    with pytest.raises(ValueError, match="saved by Hugging Face's datasets.*source=files"):
        prepared.TfdsSource(tmp_path / "two", "train")


def test_paths_without_bytes_name_files(tmp_path):
    import pyarrow

    made.write_images(tmp_path, 2)
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    images = [{"bytes": None, "path": str(tmp_path / f"{n}.jpg")} for n in range(2)]
    table = pyarrow.table({"image": pyarrow.array(images, kind), "text": ["one", "two"]})
    for path in ("x.parquet", "x.arrow"):
        if path.endswith(".parquet"):
            import pyarrow.parquet

            pyarrow.parquet.write_table(table, tmp_path / path)
        else:
            with pyarrow.ipc.new_stream(str(tmp_path / path), table.schema) as writer:
                writer.write_table(table)
        source = lists.ListSource([str(tmp_path / path)])
        assert [record["image"] for record in source] == [made.jpeg(0), made.jpeg(1)]


# ------------------------------------------------------------------------------------------ paths


def test_where_images_may_be(tmp_path):
    made.write_images(tmp_path / "photos", 1)
    absolute, above = str(tmp_path / "photos/0.jpg"), "../photos/0.jpg"
    rows = [{"image": absolute, "caption": "a"}, {"image": above, "caption": "b"}]
    path = write(tmp_path / "lists/x.json", rows)

    def can(images, number):
        try:
            return lists.ListSource([path], images)[number]["image"] == made.jpeg(0)
        except RecordError as error:
            assert "leaves the image folder" in str(error) and "--images" in str(error)
            return False

    assert can("", 0) and not can("", 1)  # the list is ours, and names the file
    assert can(str(tmp_path), 0) and can(str(tmp_path), 1)
    assert can("/", 0) and can("/", 1)
    assert not can(str(tmp_path / "lists"), 0) and not can(str(tmp_path / "other"), 1)


def test_every_list_has_a_folder_of_its_own(tmp_path):
    for n, name in enumerate("ab"):
        write(tmp_path / name / "0.jpg", made.jpeg(n))
        write(tmp_path / name / "x.json", [{"image": "0.jpg", "caption": name}])
    paths = [f"{tmp_path}/{name}/x.json" for name in "ab"]
    source = lists.ListSource(paths)
    assert [record["image"] for record in source] == [made.jpeg(0), made.jpeg(1)]


@pytest.mark.parametrize("name", ["a[1]", "b*", "c?", "d{0..3}", "e{split}", "f::g"])
def test_folders_with_odd_names(tmp_path, name):
    folder = tmp_path / name
    made.write_images(folder, 2)
    rows = [{"image": f"{n}.jpg", "caption": "a"} for n in range(2)]
    path = write(folder / "x[2].json", rows)
    (tmp_path / "a1").mkdir()
    for given in (folder, path, folder / "*.json"):
        assert len(sources.open_files(str(given), split="train")) == 2
    (folder / "tars").mkdir()
    made.write_shards(folder / "tars", 2, 1)
    assert len(sources.open_files(f"{folder}/tars/{{00000..00001}}.tar")) == 2
    write(folder / "annotations/coco_karpathy_train.json", rows)
    assert len(datasets.open_dataset("coco", str(folder), "train")) == 2


def test_images_beside_texts(tmp_path):
    made.write_images(tmp_path / "in/deeper", 3)
    made.write_images(tmp_path / "in", 2)
    write(tmp_path / "in/0.txt", "\ufeffof the text\n")
    write(tmp_path / "in/1.json", ["first", "second"])
    write(tmp_path / "in/deeper/0.txt", "text")
    write(tmp_path / "in/deeper/0.json", {"caption": "of the JSON", "url": "http://x"})
    write(tmp_path / "in/deeper/1.txt", b"caf\xe9")
    write(tmp_path / "in/lone.txt", "of nothing")
    write(tmp_path / "in/stats.json", {"count": 3})
    source = sources.open_files(str(tmp_path / "in"), split="train")
    assert captions(source) == [["of the text"], ["first", "second"], ["of the JSON"]]
    assert source[2]["image"] == made.jpeg(0) and source[2]["url"] == "http://x"
    assert source.faults.by_reason == {"not UTF-8": 1, "empty caption": 1, "no image": 1}
    # img2dataset's `files`: folders of them, and no list beside.
    made.write_images(tmp_path / "out/00000", 1)
    write(tmp_path / "out/00000/0.txt", "below")
    assert captions(sources.open_files(str(tmp_path / "out"))) == [["below"]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no tars, no lists .* and no images beside texts"):
        sources.open_files(str(tmp_path / "empty"))


def test_compressed_archives_say_how_to_unpack(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b")
    for path in (tmp_path, tmp_path / "x.tar.gz", f"{tmp_path}/*.gz"):
        with pytest.raises(ValueError, match="x.tar.gz is compressed.*gunzip"):
            sources.open_files(str(path))


def coco_own(folder, year):
    own = {
        "images": [{"id": 9, "file_name": "9.jpg"}],
        "annotations": [{"image_id": 9, "caption": f"of {year}"}],
    }
    write(folder / f"annotations/captions_train{year}.json", own)


@pytest.mark.parametrize("place", ["train2017/9.jpg", "images/train2017/9.jpg", "images/9.jpg"])
def test_coco_needs_no_year_in_the_split(tmp_path, place):
    coco_own(tmp_path, 2017)
    write(tmp_path / place, made.jpeg(1))
    (record,) = datasets.open_dataset("coco", str(tmp_path), "train")
    assert record["captions"] == ["of 2017"] and record["image"] == made.jpeg(1)
    folder = str((tmp_path / place).parent)
    (record,) = datasets.open_dataset("coco", str(tmp_path), "train2017", folder)
    assert record["image"] == made.jpeg(1)
    coco_own(tmp_path, 2014)
    with pytest.raises(
        ValueError, match="train2014.json and captions_train2017.json; name the year"
    ):
        datasets.open_dataset("coco", str(tmp_path), "train")


def test_other_names_for_splits():
    assert folders.same_split("val", ["validation", "train"]) == {"validation"}
    assert folders.same_split("val", ["validation", "val"]) == {"val"}
    assert folders.same_split("train", ["train", "restval", "test"]) == {"train", "restval"}
    assert folders.same_split("dev", ["Val"]) == {"Val"} and not folders.same_split("x", ["y"])


def test_names_are_told_apart_by_nothing_but_case_and_spaces():
    columns = Columns()
    for name in ("Image Path", "image-path", " IMAGE_PATH ", "imagepath"):
        assert columns.is_image(name) and columns.known(name)
    assert not columns.known("imagepathology")
    assert np.isnan(float("nan")) and is_missing(np.float64("nan"))
