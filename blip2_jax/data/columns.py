"""Which column holds which field, by the names that files out there give their columns."""

import difflib
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

# What columns are called in files that are out there, in lower case, with _ for spaces and hyphens.
# The first name of which a row has a value is taken.
NAMES: dict[str, tuple[str, ...]] = {
    "image": (
        *("image", "image_path", "imagepath", "filepath", "file_path", "file_name", "filename"),
        *("path", "img_path", "img", "image_file", "image_name", "img_name", "file"),
        *("image_bytes", "jpg", "jpeg", "png", "webp"),
    ),
    "image_id": ("image_id", "img_id", "imageid", "cocoid", "imgid", "id"),
    "caption": (
        *("captions", "caption", "sentences", "sentence", "raw", "texts", "text", "title", "txt"),
        *("comment", "description", "alt_text", "blip_caption"),
    ),
    "question": ("question", "questions", "query"),
    "answer": ("answers", "answer", "direct_answers", "multiple_choice_answer"),
    "conversation": ("conversations", "conversation", "messages"),
    "question_id": ("question_id", "questionid", "qid"),
    "split": ("split",),
    "url": ("url", "image_url", "img_url", "coco_url", "flickr_url"),
    "key": ("key", "__key__"),
    "status": ("status",),  # of img2dataset's downloads
    "domain": ("domain",),
    "scores": ("scores",),
    "full_answer": ("fullanswer", "full_answer"),
    "question_type": ("question_type",),
    "answer_type": ("answer_type",),
    "dataset": ("dataset",),
    "choices": ("choices",),
    "correct_choice": ("correct_choice_idx",),
}
TEXTS = ("caption", "question", "conversation")  # one of them makes a row useful
# Where an image is looked for that has no name: see `fields.Record.hints`.
PLACES = ("key", "image_id", "url")


def canonical(name: Any) -> str:
    """A column's name as `NAMES` has it."""
    return re.sub(r"[\s\-]+", "_", str(name).strip().lower())


class Columns:
    """Which column holds which field.

    Args:
      text: what a user says, "image=filepath,caption=title"; "split=" alone: there is none.

    Raises:
      ValueError: no such field, or not in that form.
    """

    def __init__(self, text: str = ""):
        self.text = text
        self.own: dict[str, str] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            field, equals, column = (word.strip() for word in part.partition("="))
            if not equals:
                raise ValueError(f"columns={text!r}: write FIELD=COLUMN, e.g. caption=title.")
            if field not in NAMES:
                near = difflib.get_close_matches(field, NAMES, 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"columns={text!r}: there is no field {field!r}; known: {', '.join(NAMES)}."
                    + hint
                )
            self.own[field] = column
        self._of = functools.lru_cache(maxsize=256)(self._find)

    def __getstate__(self) -> dict[str, Any]:
        return {"text": self.text}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["text"])  # type: ignore[misc]  # as unpickled, so constructed

    def _find(self, columns: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """Field -> those of the columns that may hold it, in the order in which they are tried."""
        by_name: dict[str, list[str]] = {}
        for column in columns:
            by_name.setdefault(canonical(column), []).append(column)
        by_field = {}
        for field, names in NAMES.items():
            if field in self.own:
                own = self.own[field]
                same = [own] if own in columns else by_name.get(canonical(own), [])
            else:
                same = [column for name in names for column in by_name.get(name, ())]
            by_field[field] = tuple(same)
        return by_field

    def get(self, row: Mapping[str, Any], field: str) -> Any:
        """A field's value; None if the row has none, or an empty one."""
        for column in self._of(tuple(row))[field]:
            if not is_missing(row[column]):
                return row[column]
        return None

    def has(self, row: Mapping[str, Any], field: str) -> bool:
        """Whether a row has a column for a field, be it empty."""
        return bool(self._of(tuple(row))[field])

    def known(self, column: str) -> bool:
        """Whether a column is of any use."""
        return any(self._of((column,)).values())

    def is_image(self, column: str) -> bool:
        """Whether a column may hold images."""
        return bool(self._of((column,))["image"])

    def check(self, columns: Iterable[str], path: str) -> None:
        """Sees whether columns can make records.

        Raises:
          ValueError: they cannot; says which there are, and which names are known.
        """
        columns = tuple(columns)
        self.check_own(columns, path)
        by_field = self._of(columns)
        lacking = []
        if not any(by_field[field] for field in ("image", *PLACES)):
            lacking.append("image")
        if not any(by_field[field] for field in TEXTS):
            lacking.append("caption")
        if lacking:
            known = "; ".join(f"{field}: {', '.join(NAMES[field])}" for field in lacking)
            example = ",".join(f"{field}=COLUMN" for field in lacking)
            raise ValueError(
                f"{path} has no column that is known to hold {'s or '.join(lacking)}s. Its "
                f"columns: {listed(columns)}. Known names of {known}. Say which it is with "
                f"--columns {example} (in a config: data.columns); the first line of a table "
                "names its columns."
            )

    def check_own(self, columns: Iterable[str], path: str) -> None:
        """Sees whether the columns that the user named are there; ValueError if one is not."""
        columns = tuple(columns)
        by_field = self._of(columns)
        for field, column in self.own.items():
            if column and not by_field[field]:
                near = difflib.get_close_matches(column, columns, 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"{path} has no column {column!r}; its columns: {listed(columns)}.{hint}"
                )


def listed(columns: Iterable[str]) -> str:
    """The first 30 names, in a form that can be printed."""
    columns = tuple(columns)
    shown = (repr(str(name)[:60])[1:-1] for name in columns[:30])
    text = ", ".join(shown) + ", ..." * (len(columns) > 30)
    return text.encode(errors="backslashreplace").decode()


class QuestionColumns(Columns):
    """Columns of a question in a list, which has an id of its own."""

    def _find(self, columns: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        by_field = super()._find(columns)
        ids = (*by_field["question_id"], *(name for name in ("qa_id", "id") if name in columns))
        return {**by_field, "question_id": ids}


def is_missing(value: Any) -> bool:
    """Whether a value says nothing: null, not a number, an empty text or list."""
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, (list, tuple, dict, bytes)) and not value)
