"""Files that evaluation servers take, written and read.

    vqa        [{"question_id": 262148000, "answer": "red"}, ...]       VQAv2, OK-VQA
    gqa        [{"questionId": "201307251", "prediction": "red"}, ...]  GQA
    captions   [{"image_id": 391895, "caption": "a man rides"}, ...]    COCO, NoCaps

Ids are written as the owners count them; what else a file holds is not read.
"""

import json
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

from blip2_jax.runtime import atomic

FIELDS = {
    "vqa": ("question_id", "answer"),
    "gqa": ("questionId", "prediction"),
    "captions": ("image_id", "caption"),
}


def official_ids(ids: Iterable[Hashable]) -> dict[Any, Any]:
    """The numbers that COCO and NoCaps give their images, by the ids of a data set.

    An id may be that number, as text, or a file's path: LAVIS's lists of COCO have nothing else
    ("val2014/COCO_val2014_000000391895.jpg" -> 391895). Ids of which two would get the same number,
    or that hold none, stay what they are.
    """
    ids = list(ids)
    numbers = []
    for key in ids:
        digits = re.findall(r"\d+", Path(str(key)).stem)
        numbers.append(int(digits[-1]) if digits else None)
    if None in numbers or len(set(numbers)) < len(ids):
        return {key: key for key in ids}
    return dict(zip(ids, numbers, strict=True))


def write(path: Path, kind: str, predictions: Mapping[Any, str]) -> None:
    """Writes texts by official id; `kind` is one of `FIELDS`."""
    key, value = FIELDS[kind]
    entries = [{key: number, value: text} for number, text in predictions.items()]
    atomic.write_json(path, entries, indent=0)


def read(path: Path, kind: str) -> dict[Any, str]:
    """The inverse of `write`.

    Raises:
      ValueError: the file is not of this kind, or has an id twice.
    """
    key, value = FIELDS[kind]
    wanted = f'a list of {{"{key}": ..., "{value}": text}}'
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"There is no file {path}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Wanted is {wanted}.") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds a {type(entries).__name__}; wanted is {wanted}.")
    predictions: dict[Any, str] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or key not in entry or not isinstance(entry.get(value), str):
            raise ValueError(f"{path}, entry {number} is {str(entry)[:80]}; wanted is {wanted}.")
        if entry[key] in predictions:
            raise ValueError(f"{path} has {key} {entry[key]!r} twice.")
        predictions[entry[key]] = entry[value]
    return predictions
