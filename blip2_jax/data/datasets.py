"""The data sets of the field, from the files that their owners publish or LAVIS lists.

    source = open_dataset("coco", "/data/coco", "train")

Every function below yields rows as `fields.read` takes them, with paths of images below the data
set's folder. `FILES` says what has to be there.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from blip2_jax.data import containers, fields, files, layouts, lists, sources
from blip2_jax.data.columns import Columns
from blip2_jax.data.containers import Line, Row
from blip2_jax.data.faults import RecordError
from blip2_jax.data.source import Source

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
    "textvqa": ("TextVQA_0.5.1_{split}.json",),
    "vizwiz": ("{split}.json",),
    "aokvqa": ("aokvqa_v1p0_{split}.json",),
    "cc3m": ("*.tar", "cc3m.json"),
    "cc12m": ("*.tar", "cc12m.json"),
    "sbu": ("*.tar", "sbu.json"),
    "laion": ("*.tar",),
}
NAMES = tuple(FILES)
LOOKED_AT = 20  # rows, to find out where the images are
IMAGE_FOLDERS = ("", "images", "flickr30k_images", "flickr30k-images", "val")
VQA_YEARS = {"train": "2014", "val": "2014", "test": "2015", "test-dev": "2015"}
YEARS = ("2014", "2015", "2017")


def open_dataset(
    name: str, folder: str, split: str, images: str = "", *, form: str = "image", columns: str = ""
) -> Source:
    """The source of a data set.

    Args:
      name: one of `NAMES`.
      folder: where its files are, local or remote.
      split: as the data set calls it; "train" of COCO includes "restval", and years may be left
        out: "val" of the VQA sets is val2014, "train" of COCO's own files the year that is there.
      images: folder of the images; "": found below `folder`.
      form: a record an "image", a "caption" or a "question".
      columns: which columns hold what, if not the usual ones; see `columns.Columns`.

    Raises:
      ValueError: the files are not there; says which.
    """
    if name not in FILES:
        raise ValueError(f"No data set {name!r}; known: {', '.join(NAMES)}.")
    path = find(name, folder, split)
    if path.endswith(".tar"):
        return sources.open_files(path.rsplit("/", 1)[0])
    names = Columns(columns)
    lines = lines_of(name, path, names)
    first = list(itertools.islice(lines, LOOKED_AT))
    lines = itertools.chain(first, lines)
    file = path.rsplit("/", 1)[-1]
    prefix = ""  # COCO's own files name images without their folder
    if name == "coco" and file.startswith("captions_"):
        prefix = file.removeprefix("captions_").removesuffix(".json") + "/"
    folders = [images] if images else [_join(folder, below) for below in (*IMAGE_FOLDERS, split)]
    images, prefix = _locate(folders, prefix, first, names) or (images or folder, prefix)
    if prefix:
        lines = _prefixed(lines, prefix, names)
    return lists.ListSource(lines, images, split=split, form=form, columns=columns)


def _join(folder: str, name: str) -> str:
    return files.join(folder, name) if name else folder


def find(name: str, folder: str, split: str) -> str:
    """The file that a data set is read from.

    Raises:
      ValueError: none is there, or those of several years.
    """
    vqa = name in ("vqav2", "okvqa")
    spelled = [split + VQA_YEARS[split]] if vqa and split in VQA_YEARS else []
    fs, root = files.filesystem(folder)
    for pattern in FILES[name]:
        for below in ("", "annotations", "Annotations"):
            where = _join(folder, below)
            if "*" in pattern:
                paths = files.matches(files.join(where, pattern))
                if paths:
                    return paths[0]
                continue
            for own in (*spelled, split):
                path = files.join(where, pattern.format(split=own))
                if files.exists(path):
                    return path
            years = [files.join(where, pattern.format(split=split + year)) for year in YEARS]
            years = [path for path in years if name == "coco" and files.exists(path)]
            if len(years) > 1:
                raise ValueError(
                    f"{folder} holds {' and '.join(p.rsplit('/', 1)[-1] for p in years)}; name the "
                    f"year in the split, e.g. {split}{YEARS[-1]}."
                )
            if years:
                return years[0]
    wanted = ", ".join(pattern.format(split=[*spelled, split][0]) for pattern in FILES[name])
    raise ValueError(
        f"{folder} holds no {name} ({split!r}): looked for {wanted}, there and in annotations/."
    )


def _locate(
    folders: list[str], prefix: str, first: list[Line], columns: Columns
) -> tuple[str, str] | None:
    """The folder that the images of the first rows, or some of them, are in, and whether their
    names need the prefix there; None if they are in none of the places."""
    for _, row in first:
        name = columns.get(row, "image") if isinstance(row, dict) else None
        for folder in folders if isinstance(name, str) else ():
            for start in dict.fromkeys((prefix, "")):
                if files.exists(files.join(folder, f"{start}{name}")):
                    return folder, start
    return None


def lines_of(name: str, path: str, columns: Columns) -> Iterator[Line]:
    """The rows of a data set's file, in the owners' form or in LAVIS's."""
    file = path.rsplit("/", 1)[-1]
    if file.endswith(".token"):
        return _flickr_lines(path)
    if "OpenEnded_mscoco" in file:
        return _vqa_lines(path)
    if name == "gqa":
        return _gqa_lines(path, columns)
    if file in ("region_descriptions.json", "question_answers.json"):
        return _vg_lines(path)
    return layouts.read(path, columns).lines


def _prefixed(lines: Iterator[Line], prefix: str, columns: Columns) -> Iterator[Line]:
    """Rows whose images' names begin in another folder."""
    for line in lines:
        name = columns.get(line.row, "image") if isinstance(line.row, dict) else None
        if isinstance(line.row, dict) and isinstance(name, str):
            line = Line(line.where, {**line.row, "image": prefix + name})
        yield line


def _entries(path: str, key: str = "") -> list[Any]:
    """The list in a JSON file, or under a key of its object; ValueError if there is none."""
    document = containers.document(path)
    document = document.get(key) if key and isinstance(document, dict) else document
    if not isinstance(document, list):
        raise ValueError(f"{path} holds no list{f' of {key}' if key else ''}.")
    return document


def _vqa_lines(path: str) -> Iterator[Line]:
    """VQAv2 and OK-VQA: questions, and ten answers each where they are published."""
    other = path.replace("OpenEnded_", "").replace("_questions.json", "_annotations.json")
    annotations = _entries(other, "annotations") if files.exists(other) else []
    # v2_OpenEnded_mscoco_test-dev2015_questions.json asks about the images of test2015.
    split = path.rsplit("mscoco_", 1)[-1].removesuffix("_questions.json").replace("-dev", "")

    def image(number: Any) -> str | None:
        number = fields.identity_of(number)
        if not str(number).isdigit():
            return None
        return f"{split}/COCO_{split}_{int(number or 0):012d}.jpg"

    return layouts.joined_questions(_entries(path, "questions"), annotations, path, other, image)


def _gqa_lines(path: str, columns: Columns) -> Iterator[Line]:
    """GQA: one file, or the ten of train_all."""
    head, is_part, _ = path.rpartition("_0.json")
    for part in files.matches(f"{head}_*.json") if is_part else [path]:
        for line in layouts.read(part, columns).lines:
            number = line.row.get("imageId") if isinstance(line.row, dict) else None
            if isinstance(line.row, dict) and fields.identity_of(number) is not None:
                line = Line(line.where, {**line.row, "image": f"{fields.identity_of(number)}.jpg"})
            yield line


def _vg_lines(path: str) -> Iterator[Line]:
    """Visual Genome: regions' phrases or questions, one row an image; two image folders."""
    data = path.rsplit("/", 1)[0] + "/image_data.json"
    urls = {}
    for image in _entries(data):
        if isinstance(image, dict):
            urls[fields.identity_of(image.get("image_id"))] = image.get("url")
    for number, entry in enumerate(_entries(path)):
        line = containers.as_row(entry, f"{path}[{number}]")
        if isinstance(line.row, dict):
            line = Line(line.where, _vg_row(line.row, urls))
        yield line


def _vg_row(image: Row, urls: dict[Any, Any]) -> Row:
    key = fields.identity_of(image.get("id", image.get("image_id")))
    row: Row = {"image_id": key}
    url = urls.get(key)
    if isinstance(url, str):
        row["image"] = "/".join(url.rsplit("/", 2)[-2:])
    regions = image.get("regions")
    if isinstance(regions, list):
        row["captions"] = [r.get("phrase") if isinstance(r, dict) else r for r in regions]
    else:
        row["questions"] = image.get("qas")
    return row


def _flickr_lines(path: str) -> Iterator[Line]:
    """Flickr30k's own file: `36979.jpg#0<tab>A caption .`, without splits."""
    for number, text in enumerate(containers.decode(containers.read(path)).split("\n"), 1):
        where = f"{path}:{number}"
        key, tab, caption = text.partition("\t")
        if tab:
            image = key.partition("#")[0]
            row = {"image": image, "image_id": image.partition(".")[0], "caption": caption}
            yield Line(where, row)
        elif text.strip():
            yield Line(where, RecordError("wrong number of columns", where))
