"""What a row means: its fields are read, typed and checked here and nowhere else.

Files name the same things in many ways; `columns` finds them. A value that is there and cannot be
used is never turned into text: the row is refused with a reason, or the rest of it is used and the
part is noted.
"""

import ast
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

from blip2_jax.data.columns import Columns, QuestionColumns, is_missing
from blip2_jax.data.containers import Row, StoredImage, decode, is_text, parse
from blip2_jax.data.faults import RecordError

Question = dict[str, Any]

MAX_ANSWERS = 1000  # of one question, where they are counted
_NO_COLUMNS, _NESTED = Columns(), QuestionColumns()


class Record(NamedTuple):
    """A row, understood.

    Attributes:
      record: `id`, `captions`, `questions` if any, and more that is kept; `image` is the name of
        its file, or None.
      stored: where the image's bytes are, if they are in the list itself.
      hints: names that the image's file may have, if the row does not name it.
      notes: what of the row is not used, and why.
    """

    record: Row
    stored: StoredImage | bytes | None
    hints: list[str]
    notes: list[str]


def read(row: Mapping[str, Any], columns: Columns) -> Record:
    """Reads a row.

    Raises:
      RecordError: it cannot be used; the reason.
    """
    notes: list[str] = []
    image, stored = _image(columns.get(row, "image"))
    url = columns.get(row, "url")
    if image and re.match(r"https?://", image):
        image, url = None, image
    status = columns.get(row, "status")
    if isinstance(status, str) and image is None and stored is None and status != "success":
        raise RecordError("not downloaded")
    identity = identity_of(columns.get(row, "image_id"))
    hints = [] if image else _hints(identity_of(columns.get(row, "key")), identity, url)
    if not (image or stored or hints):
        raise RecordError("no image named")
    if identity is None:
        identity = image or next(iter(hints), "")
    captions = captions_of(columns.get(row, "caption"), notes)
    questions = _conversation(columns.get(row, "conversation"), captions, notes)
    questions += _questions(columns, row, notes)
    if not captions and not questions:
        faults = (note for note in notes if "answer" not in note)
        raise RecordError(next(faults, "empty caption"))
    record: Row = {"image": image, "id": str(identity), "captions": captions}
    if questions:
        record["questions"] = questions
    if isinstance(url, str) and is_text(url):
        record["url"] = url
    domain, scores = columns.get(row, "domain"), columns.get(row, "scores")
    if isinstance(domain, str) and is_text(domain):
        record["domain"] = domain
    if isinstance(scores, list) and all(isinstance(score, (int, float)) for score in scores):
        record["scores"] = scores
    return Record(record, stored, hints, notes)


def pair(meta: bytes, text: bytes) -> Row:
    """The row of an image from the JSON and the text that stand beside it; either may be empty.

    Captions of the JSON go before the text.

    Raises:
      RecordError: one of them cannot be read.
    """
    row: Any = parse(decode(meta)) if meta else {}
    if isinstance(row, (list, str)):  # CapFilt: the file is a list of captions
        row = {"captions": row}
    elif not isinstance(row, dict):
        raise RecordError("not a JSON object")
    caption = decode(text) if text else ""
    if not is_text(caption):
        raise RecordError("not UTF-8")
    if _NO_COLUMNS.get(row, "caption") is None:
        row = {**row, "caption": caption}
    return row


# ----------------------------------------------------------------------------------- single values


def text_of(value: Any, what: str) -> str:
    """A text without the space around it.

    Raises:
      RecordError: it is something else, empty, or holds half a character.
    """
    if is_missing(value):
        raise RecordError(f"empty {what}")
    if not isinstance(value, (str, bytes)):
        raise RecordError(f"{what} is no text")
    try:
        text = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise RecordError("not UTF-8") from error
    if not is_text(text):
        raise RecordError("not UTF-8")
    return text.strip()


def identity_of(value: Any) -> int | str | None:
    """An id: a whole number or a text; None where there is none."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip() and is_text(value):
        return value.strip()
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def split_of(row: Mapping[str, Any], columns: Columns) -> str | None:
    """The split that a row names; None where it has no column for that; "" where that is empty."""
    if not columns.has(row, "split"):
        return None
    value = identity_of(columns.get(row, "split"))
    return "" if value is None else str(value)


def _image(value: Any) -> tuple[str | None, StoredImage | bytes | None]:
    """The name of an image's file, and its bytes, if they are in the list."""
    if isinstance(value, Mapping):  # Hugging Face datasets
        stored = value.get("bytes")
        name = next((value[k] for k in ("path", "file_name", "filename") if value.get(k)), None)
        name = _image(name)[0] if isinstance(name, str) else None
        return name, stored if isinstance(stored, (StoredImage, bytes)) and stored else None
    if isinstance(value, bytes):
        return None, value
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return _image(value[0])
    if isinstance(value, (list, tuple)) and value:
        raise RecordError("several images")
    if value is None:
        return None, None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value), None
    name = text_of(value, "image name")
    if "\0" in name:
        raise RecordError("image name is no text")
    if name.startswith("file://"):
        name = unquote(urlparse(name).path)
    return name if "/" in name else name.replace("\\", "/"), None


def _hints(key: int | str | None, identity: int | str | None, url: Any) -> list[str]:
    """Names of files, with or without a suffix, that an image may be in."""
    names = [str(key)] if key is not None else []
    if identity is not None:
        names.append(str(identity))
        if str(identity).isdigit():
            names.append(f"{int(identity):012d}")  # COCO's
    if isinstance(url, str) and is_text(url):
        names.append(re.split(r"[?#]", url.strip())[0].rstrip("/").rpartition("/")[2])
    return [name for name in names if name]


# ---------------------------------------------------------------------------------------- captions


def _unpacked(value: Any) -> Any:
    """A list that a table holds as text: JSON, or as Python prints it."""
    if isinstance(value, str) and value.lstrip()[:1] == "[" and value.rstrip()[-1:] == "]":
        for parse in (json.loads, ast.literal_eval):
            try:
                parsed = parse(value.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                continue
            if isinstance(parsed, list):
                return parsed
    return value  # a text that begins with a bracket


def _entries(value: Any) -> list[Any]:
    """The entries of a list, or of one value; a dict of lists of one length is a list of dicts."""
    value = _unpacked(value)
    if isinstance(value, Mapping):
        lists = {key: some for key, some in value.items() if isinstance(some, (list, tuple))}
        counts = {len(some) for some in lists.values()}
        if len(counts) == 1:
            entries = zip(*lists.values(), strict=True)
            return [dict(zip(lists, entry, strict=True)) for entry in entries]
    if is_missing(value):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


SENTENCE = ("raw", "caption", "text", "sentence")  # what the text of an entry is called


def captions_of(value: Any, notes: list[str]) -> list[str]:
    """The captions in a column: a text, a list of texts (also written as text), or COCO's and
    Karpathy's sentences. What is empty or no text is noted."""
    captions = []
    for entry in _entries(value):
        if isinstance(entry, Mapping):
            own = next((entry[k] for k in SENTENCE if not is_missing(entry.get(k))), None)
            tokens = entry.get("tokens")
            if own is None and isinstance(tokens, (list, tuple)):
                own = " ".join(t for t in tokens if isinstance(t, str))
            entry = own
        try:
            captions.append(text_of(entry, "caption"))
        except RecordError as error:
            notes.append(error.reason)
    return captions


# --------------------------------------------------------------------------------------- questions

QUESTION_TEXTS = ("question", "query", "text")
ANSWER_TEXTS = ("answer", "text", "value", "raw_answer")
ASKS, ANSWERS = ("human", "user", "question"), ("gpt", "assistant", "model", "answer")


def _questions(columns: Columns, row: Mapping[str, Any], notes: list[str]) -> list[Question]:
    """The questions in a row, as a list of {"question", "answers", ...}."""
    questions: list[Question] = []
    entries = _entries(columns.get(row, "question"))
    answers = _unpacked(columns.get(row, "answer"))
    if isinstance(answers, (list, tuple)) and len(entries) == len(answers) > 1:
        # A list of questions and one of their answers.
        entries = [
            {"question": entry, "answer": answer} if isinstance(entry, str) else entry
            for entry, answer in zip(entries, answers, strict=True)
        ]
    for entry in entries:
        try:
            if isinstance(entry, Mapping):
                questions.append(_question(entry, _NESTED, notes))
            elif len(entries) == 1:
                questions.append(_question({**row, _ASKED: entry}, columns, notes))
            else:
                questions.append({"question": text_of(entry, "question"), "answers": []})
        except RecordError as error:
            notes.append(error.reason)
    return questions


_ASKED = "\0question"  # the key of a row's question once it is known


def _question(entry: Mapping[str, Any], columns: Columns, notes: list[str]) -> Question:
    """One question, from a row or from an entry of a row's list.

    Raises:
      RecordError: there is no text that asks.
    """
    names = (_ASKED,) if _ASKED in entry else QUESTION_TEXTS
    asked = next((entry[name] for name in names if not is_missing(entry.get(name))), None)
    question: Question = {"question": text_of(asked, "question")}
    choices = _choices(columns.get(entry, "choices"), notes)
    answers = columns.get(entry, "answer")
    correct = columns.get(entry, "correct_choice")
    if answers is None and isinstance(correct, int) and 0 <= correct < len(choices):
        answers = choices[correct]
    question["answers"] = _answers(answers, notes)
    if answers is None and columns.has(entry, "answer"):
        notes.append("empty answer")
    identity = identity_of(columns.get(entry, "question_id"))
    if identity is not None:
        question["question_id"] = identity
    for field in ("question_type", "answer_type", "dataset", "full_answer"):
        value = columns.get(entry, field)
        if isinstance(value, str) and is_text(value):
            question[field] = value
    if choices:
        question["choices"] = choices
    return question


def _answers(value: Any, notes: list[str]) -> list[str]:
    """Answers as texts: of one or several, of annotators' dicts, or counted, {"yes": 3}."""
    if value is None:
        return []
    value = _unpacked(value)
    if isinstance(value, Mapping) and not {*value} & {*ANSWER_TEXTS}:
        if not all(map(_is_count, value.values())) or sum(value.values()) > MAX_ANSWERS:
            notes.append("answer counts are no whole numbers")
            return []
        value = [text for text, count in value.items() for _ in range(count)]
    answers = []
    for entry in _entries(value):
        if isinstance(entry, Mapping):
            entry = next((entry[k] for k in ANSWER_TEXTS if not is_missing(entry.get(k))), None)
        number = identity_of(entry) if not isinstance(entry, str) else None
        if number is None and isinstance(entry, float) and math.isfinite(entry):
            number = repr(entry)
        try:
            answers.append(str(number) if number is not None else text_of(entry, "answer"))
        except RecordError as error:
            notes.append(error.reason)
    return answers


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _choices(value: Any, notes: list[str]) -> list[str]:
    value = _unpacked(value)
    if value is None:
        return []
    if isinstance(value, (list, tuple)) and all(isinstance(v, str) and is_text(v) for v in value):
        return [choice.strip() for choice in value]
    notes.append("choices are no list of texts")
    return []


def _conversation(value: Any, captions: list[str], notes: list[str]) -> list[Question]:
    """LLaVA's and chat models' turns as questions, each with the answer that follows it.

    What answers the image alone is a caption, and joins `captions`.
    """
    questions: list[Question] = []
    asked: str | None = None
    for turn in _entries(value):
        if not isinstance(turn, Mapping):
            notes.append("conversation is no list of turns")
            continue
        role = str(turn.get("from", turn.get("role", ""))).lower()
        text = _turn_text(turn.get("value", turn.get("content")))
        if role in ASKS:
            asked = text
        elif role in ANSWERS and text and asked is not None:
            if asked:
                questions.append({"question": asked, "answers": [text]})
            else:
                captions.append(text)
            asked = None
        elif role != "system":
            notes.append("conversation has turns without a question or an answer")
    return questions


def _turn_text(value: Any) -> str:
    """A turn's text, without the mark that stands for the image."""
    if isinstance(value, (list, tuple)):  # parts: {"type": "text", "text": ...}, images
        value = " ".join(
            part["text"]
            for part in value
            if isinstance(part, Mapping) and isinstance(part.get("text"), str)
        )
    if not isinstance(value, str) or not is_text(value):
        return ""
    return value.replace("<image>", "").strip()
