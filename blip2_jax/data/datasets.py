"""The data sets of the field, from the files that their owners publish or LAVIS lists.

    source = open_dataset("coco", "/data/coco", "train")

Every function below yields rows as `lists.normalize` reads them, with paths of images below the
data set's folder. `FILES` says what has to be there.
"""

import csv
import io
import itertools
import json
from collections.abc import Iterator
from typing import Any

from blip2_jax.data import files, lists, sources
from blip2_jax.data.faults import RecordError

Rows = Iterator[lists.Row | RecordError]

# What is looked for, in the folder and in its annotations/; the first that is there is read.
# {split} is the split. Image folders: where the rows' paths may begin.
FILES: dict[str, tuple[str, ...]] = {
    "coco": ("dataset_coco.json", "coco_karpathy_{split}.json", "captions_{split}.json"),
    "flickr30k": ("dataset_flickr30k.json", "flickr30k_{split}.json", "results_20130124.token"),
    "nocaps": ("nocaps_{split}_4500_captions.json", "nocaps_{split}.json"),
    "vg": ("region_descriptions.json", "vg_caption.json"),
    "vg_qa": ("question_answers.json", "vg_qa.json"),
    "vqav2": ("v2_OpenEnded_mscoco_{split}_questions.json", "vqa_{split}.json"),
    "okvqa": ("OpenEnded_mscoco_{split}_questions.json", "okvqa_{split}.json"),
    "gqa": ("{split}_questions.json", "{split}_questions/{split}_questions_0.json"),
    "cc3m": ("*.tar", "cc3m.json"),
    "cc12m": ("*.tar", "cc12m.json"),
    "sbu": ("*.tar", "sbu.json"),
    "laion": ("*.tar",),
}
NAMES = tuple(FILES)
LOOKED_AT = 20  # rows, to find out where the images are
IMAGE_FOLDERS = ("", "images", "flickr30k_images", "flickr30k-images", "val")
YEARS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}


def open_dataset(
    name: str, folder: str, split: str, images: str = "", *, form: str = "image"
) -> Any:
    """The source of a data set.

    Args:
      name: one of `NAMES`.
      folder: where its files are, local or remote.
      split: as the data set calls it; "train" of COCO includes "restval", "val" of the VQA sets
        is val2014.
      images: folder of the images; "": found below `folder`.
      form: a record an "image", a "caption" or a "question".

    Raises:
      ValueError: the files are not there; says which.
    """
    if name not in FILES:
        raise ValueError(f"No data set {name!r}; known: {', '.join(NAMES)}.")
    path = find(name, folder, split)
    if path.endswith(".tar"):
        return sources.open_files(path)
    rows = rows_of(name, path, split)
    first = list(itertools.islice(rows, LOOKED_AT))
    images = images or _image_folder(folder, first)
    return lists.ListSource(itertools.chain(first, rows), images, split=split, form=form)


def find(name: str, folder: str, split: str) -> str:
    """The file that a data set is read from.

    Raises:
      ValueError: none is there.
    """
    official = YEARS.get(split, split) if name in ("vqav2", "okvqa") else split
    fs, root = files.filesystem(folder)
    for pattern in FILES[name]:
        for place in ("", "annotations"):
            for spelled in dict.fromkeys((official, split)):
                file = files.join(place, pattern.format(split=spelled))
                if fs.glob(files.join(root, file)):
                    return files.join(folder, file)
    wanted = ", ".join(pattern.format(split=official) for pattern in FILES[name])
    raise ValueError(
        f"{folder} holds no {name} ({split!r}): looked for {wanted}, there and in annotations/."
    )


def _image_folder(folder: str, first: list[lists.Row | RecordError]) -> str:
    """The folder that the images of the first rows, or some of them, are in."""
    images = [lists.normalize(row)["image"] for row in first if isinstance(row, dict)]
    fs, root = files.filesystem(folder)
    for image in filter(None, images):
        for place in IMAGE_FOLDERS:
            if fs.exists(files.join(files.join(root, place) if place else root, image)):
                return files.join(folder, place) if place else folder
    return folder


def rows_of(name: str, path: str, split: str) -> Rows:
    """The rows of a data set's file, in the owners' form or in LAVIS's."""
    file = path.rsplit("/", 1)[-1]
    if file.endswith(".token"):
        return _flickr_rows(path)
    if name == "coco" and file.startswith("captions_"):
        return _prefixed(lists.read_rows(path), split)
    if "OpenEnded_mscoco" in file:
        return _vqa_rows(path)
    if name == "gqa":
        return _gqa_rows(path)
    if file in ("region_descriptions.json", "question_answers.json"):
        return _vg_rows(path)
    return lists.read_rows(path, split)


def _load(path: str) -> Any:
    try:
        return json.loads(files.read(path))
    except (RecordError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _prefixed(rows: Rows, folder: str) -> Rows:
    """COCO's own files name images without their folder."""
    for row in rows:
        yield row if isinstance(row, RecordError) else {**row, "image": f"{folder}/{row['image']}"}


def _vqa_rows(path: str) -> Rows:
    """VQAv2 and OK-VQA: questions, and ten answers each where they are published."""
    questions = _load(path)["questions"]
    other = path.replace("OpenEnded_", "").replace("_questions.json", "_annotations.json")
    fs, inner = files.filesystem(other)
    found = _load(other)["annotations"] if fs.exists(inner) else []
    answers = {annotation["question_id"]: annotation for annotation in found}
    if found:
        _check_same_questions(questions, answers, path, other)
    # v2_OpenEnded_mscoco_test-dev2015_questions.json asks about the images of test2015.
    split = path.rsplit("mscoco_", 1)[-1].removesuffix("_questions.json").replace("-dev", "")
    for question in questions:
        known = answers.get(question["question_id"], {})
        number = question["image_id"]
        yield {
            "image": f"{split}/COCO_{split}_{number:012d}.jpg",
            "image_id": number,
            "question": question["question"],
            "question_id": question["question_id"],
            "answers": known.get("answers", []),
            **{key: known[key] for key in ("question_type", "answer_type") if key in known},
        }


def _check_same_questions(
    questions: list[lists.Row], answers: dict[Any, lists.Row], path: str, other: str
) -> None:
    """Holds questions and annotations to one version and split; scores of a part would mislead."""
    asked = {question["question_id"]: question["image_id"] for question in questions}
    strange = [key for key in asked if key not in answers]
    strange += [key for key in answers if key not in asked]
    both = [key for key in asked if key in answers]
    strange += [key for key in both if answers[key].get("image_id", asked[key]) != asked[key]]
    if strange:
        some = ", ".join(map(str, strange[:5]))
        raise ValueError(
            f"{other} is of another version or split than {path}: of {len(asked)} questions and "
            f"{len(answers)} annotations, {len(strange)} ids are in one file alone or are of "
            f"another image ({some}{', ...' if len(strange) > 5 else ''}). Take both files from "
            "one release, or move the annotations away to predict without scores."
        )


def _gqa_rows(path: str) -> Rows:
    """GQA: one file, or the ten of train_all."""
    head, is_part, _ = path.rpartition("_0.json")
    parts = [path]
    if is_part:
        parts = files.expand(f"{head}_*.json", (".json",))
    for part in parts:
        for row in lists.read_rows(part):
            if isinstance(row, dict) and "imageId" in row:
                row = {**row, "image": f"{row['imageId']}.jpg"}
            yield row


def _vg_rows(path: str) -> Rows:
    """Visual Genome: regions' phrases or questions, one row an image; two image folders."""
    data = path.rsplit("/", 1)[0] + "/image_data.json"
    urls = {image["image_id"]: image["url"] for image in _load(data)}
    for image in _load(path):
        number = image.get("id", image.get("image_id"))
        folder, file = urls[number].rsplit("/", 2)[-2:]
        row: lists.Row = {"image": f"{folder}/{file}", "image_id": number}
        if "regions" in image:
            row["captions"] = [region["phrase"] for region in image["regions"]]
        else:
            row["questions"] = [
                {"question": qa["question"], "answers": [qa["answer"]], "question_id": qa["qa_id"]}
                for qa in image["qas"]
            ]
        yield row


def _flickr_rows(path: str) -> Rows:
    """Flickr30k's own file: `36979.jpg#0<tab>A caption .`, without splits."""
    text = files.read(path).decode(errors="replace")
    for key, caption in csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE):
        image = key.partition("#")[0]
        yield {"image": image, "image_id": image.partition(".")[0], "caption": caption}
