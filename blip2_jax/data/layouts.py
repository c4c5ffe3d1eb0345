"""JSON documents in the layouts that are published, as rows for `fields`.

A list of objects; COCO's captions and NoCaps'; Karpathy's; questions of VQA with their annotations;
TextVQA's; GQA's dict. An entry that does not fit its layout is a RecordError in its place.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from blip2_jax.data import arrow, containers, delimited, files
from blip2_jax.data.columns import Columns, is_missing, listed
from blip2_jax.data.containers import Contents, Line, Row
from blip2_jax.data.faults import RecordError
from blip2_jax.data.fields import identity_of

LISTS = ("data", "rows", "examples", "samples", "questions", "annotations", "images")


def read(path: str, columns: Columns) -> Contents:
    """The rows of a list in any of the known formats.

    Raises:
      ValueError: the file as a whole cannot be read.
    """
    kind = containers.suffix(path)
    if kind not in containers.SUFFIXES:
        raise ValueError(f"{path}: lists end in {', '.join(containers.SUFFIXES)}.")
    if kind in (".json", ".jsonl", ".ndjson"):
        return Contents([], rows(containers.document(path), path, columns))
    if kind == ".parquet":
        return arrow.read_parquet(path, columns.known, columns.is_image)
    if kind in (".arrow", ".feather"):
        return arrow.read_arrow(path, columns.known, columns.is_image)
    return delimited.read(path, columns.known, columns.is_image)


def rows(document: Any, path: str, columns: Columns) -> Iterator[Line]:
    """The rows of a document, or of lines that are documents.

    Raises:
      ValueError: it has none of the known layouts.
    """
    if isinstance(document, Iterator):
        return document
    if isinstance(document, list):
        return _objects(document, path)
    if not isinstance(document, dict):
        raise ValueError(f"{path}: a list of rows is wanted, this is {type(document).__name__}.")
    images, annotations = document.get("images"), document.get("annotations")
    if isinstance(images, list) and isinstance(annotations, list):
        return _coco(images, annotations, path)
    if isinstance(images, list) and any(isinstance(i, dict) and "sentences" in i for i in images):
        return _karpathy(images, path)
    if isinstance(document.get("questions"), list) and isinstance(annotations, list):
        return joined_questions(document["questions"], annotations, path, path)
    by_column = _by_column(document, columns)
    if by_column:
        return _objects(by_column, path)
    keys = [name for name in LISTS if isinstance(document.get(name), list)]
    if keys:
        return _objects(document[keys[0]], path, f".{keys[0]}")
    if sum(map(_is_image, document)) > len(document) / 2:  # file -> captions
        pairs = (
            some if isinstance(some, dict) else {"captions": some} for some in document.values()
        )
        return _objects(
            [{**p, "image": name} for name, p in zip(document, pairs, strict=True)], path
        )
    if any(isinstance(row, dict) for row in document.values()):
        return _by_key(document, path)
    raise ValueError(
        f"{path}: rows in none of the known layouts (top-level keys: "
        f"{listed(document)}). A list of objects with 'image' and 'caption' works."
    )


def _is_image(name: str) -> bool:
    return containers.suffix(name)[1:] in containers.IMAGE_SUFFIXES


def _by_column(document: Row, columns: Columns) -> list[Any]:
    """The rows of a document that holds columns, as pandas writes them in two of its forms."""
    names, data = document.get("columns"), document.get("data")
    if isinstance(names, list) and isinstance(data, list):
        whole = [isinstance(row, list) and len(row) == len(names) for row in data]
        return [
            dict(zip(map(str, names), row, strict=True)) if ok else row
            for row, ok in zip(data, whole, strict=True)
        ]
    values = list(document.values())
    if not sum(map(columns.known, document)) > 1:
        return []
    if all(isinstance(value, dict) and value.keys() == values[0].keys() for value in values):
        values = [list(value.values()) for value in values]
    if all(isinstance(value, list) and len(value) == len(values[0]) for value in values):
        return [dict(zip(document, row, strict=True)) for row in zip(*values, strict=True)]
    return []


def _objects(entries: list[Any], path: str, inside: str = "") -> Iterator[Line]:
    for number, entry in enumerate(entries):
        yield containers.as_row(entry, f"{path}{inside}[{number}]")


def _by_key(document: Row, path: str) -> Iterator[Line]:
    """GQA: question id -> question."""
    for key, row in document.items():
        line = containers.as_row(row, f"{path}[{key[:40]!a}]")
        yield line._replace(row={ID: key, **line.row}) if isinstance(line.row, dict) else line


def checked(
    entries: Iterable[Any], where: Callable[[int], str], needed: str
) -> Iterator[tuple[str, Row | None, Any]]:
    """Entries with their place and the id that they must have; those without one have no row."""
    for number, entry in enumerate(entries):
        key = identity_of(entry.get(needed)) if isinstance(entry, dict) else None
        yield where(number), entry if key is not None else None, str(key)


def _coco(images: list[Any], annotations: list[Any], path: str) -> Iterator[Line]:
    """COCO's captions, and NoCaps': a row a caption, those of an image together."""
    captions: dict[str, list[tuple[str, Row]]] = {}
    faults = []
    for where, row, key in checked(annotations, lambda n: f"{path}.annotations[{n}]", "image_id"):
        if row is None:
            faults.append(Line(where, RecordError("caption without an image id", where)))
        else:
            captions.setdefault(key, []).append((where, row))
    for where, image, key in checked(images, lambda n: f"{path}.images[{n}]", "id"):
        if image is None:
            yield Line(where, RecordError("image without an id", where))
            continue
        about = {name: value for name, value in image.items() if name not in ("id", "caption")}
        about["image_id"] = image["id"]
        for caption_where, row in captions.pop(key, [(where, {})]):
            yield Line(caption_where, about | {"caption": row.get("caption")})
    for unknown in captions.values():
        for where, _ in unknown:
            yield Line(where, RecordError("caption of an image that is not in the list", where))
    yield from faults


def _karpathy(images: list[Any], path: str) -> Iterator[Line]:
    """Karpathy's own files (COCO, Flickr30k): one row an image."""
    for number, image in enumerate(images):
        where = f"{path}.images[{number}]"
        line = containers.as_row(image, where)
        if isinstance(line.row, dict):
            folder, name = line.row.get("filepath"), line.row.get("filename")
            kept = ("sentences", "split", "url")
            row: Row = {key: line.row[key] for key in kept if key in line.row}
            if isinstance(name, str):
                row["image"] = files.join(folder if isinstance(folder, str) else "", name)
            row["image_id"] = line.row.get("cocoid", line.row.get("imgid"))
            line = Line(where, row)
        yield line


def joined_questions(
    questions: list[Any],
    annotations: list[Any],
    path: str,
    other: str,
    image: Callable[[Any], str | None] | None = None,
) -> Iterator[Line]:
    """Questions with the answers of their annotations; VQAv2's, OK-VQA's and those like them.

    Ids of one half may be numbers and those of the other texts.

    Args:
      questions: entries of the one file.
      annotations: entries of the other; empty where answers are not public.
      path, other: the files.
      image: the file of an image, by its id; None: it is looked for.

    Raises:
      ValueError: the two are of different versions or splits.
    """
    answers: dict[str, Row] = {}
    faults = []
    for where, row, key in checked(annotations, lambda n: f"{other}.annotations[{n}]", ID):
        if row is None or key in answers:
            reason = "annotation without a question id" if row is None else "duplicated key"
            faults.append(Line(where, RecordError(reason, where)))
        else:
            answers[key] = row
    asked = list(checked(questions, lambda n: f"{path}.questions[{n}]", ID))
    if annotations:
        damaged = len(faults) + sum(row is None for _, row, _ in asked)
        known = {key: row for _, row, key in asked if row is not None}
        _check_same_questions(known, answers, damaged, path, other)
    for where, question, key in asked:
        if question is None:
            yield Line(where, RecordError("question without an id", where))
            continue
        annotation = answers.get(key, {})
        row = {**{name: annotation[name] for name in ANNOTATED if name in annotation}, **question}
        number = question.get("image_id", annotation.get("image_id"))
        if image is not None and not is_missing(number):
            row["image"] = image(number)
        yield Line(where, row | {"image_id": number})
    yield from faults


ID = "question_id"
ANNOTATED = ("answers", "multiple_choice_answer", "question_type", "answer_type")


def _check_same_questions(
    questions: dict[str, Row], answers: dict[str, Row], damaged: int, path: str, other: str
) -> None:
    """Holds questions and annotations to one version and split; scores of a part would mislead.

    What is `damaged`, an entry without an id, may lack its other half.
    """

    def image(row: Row) -> str:
        return str(identity_of(row.get("image_id")))

    strange = [key for key in questions if key not in answers]
    strange += [key for key in answers if key not in questions]
    both = [key for key in questions if key in answers and "image_id" in answers[key]]
    strange += [key for key in both if image(answers[key]) != image(questions[key])]
    if len(strange) > damaged:
        some = ", ".join(map(str, strange[:5]))
        raise ValueError(
            f"{other} is of another version or split than {path}: of {len(questions)} questions "
            f"and {len(answers)} annotations, {len(strange)} ids are in one file alone or are of "
            f"another image ({some}{', ...' if len(strange) > 5 else ''}). Take both files from "
            "one release, or move the annotations away to predict without scores."
        )
