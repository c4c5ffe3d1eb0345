"""Texts as the published models read them: LAVIS's cleaning, and T5's prefix and suffix."""

import re
from typing import Any

import numpy as np

MAX_WORDS = 50
_PUNCTUATION = re.compile(r'[.!"()*#:;~]')
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SPACES = re.compile(r"\s{2,}")


def _first_words(text: str, max_words: int) -> str:
    return " ".join(text.split(" ")[:max_words])


def fold(text: str) -> str:
    """One space for every run of white space or control characters, line ends included."""
    return " ".join(_CONTROLS.sub(" ", text).split())


def folded(record: dict[str, Any]) -> dict[str, Any]:
    """A record (see `source.Source`) with `fold` on its captions, questions and answers."""
    record = dict(record)
    if "captions" in record:
        record["captions"] = [fold(text) for text in record["captions"]]
    if "questions" in record:
        record["questions"] = [_folded_question(question) for question in record["questions"]]
    return record


def _folded_question(question: dict[str, Any]) -> dict[str, Any]:
    """A question and its answers, folded; its other fields are as they were."""
    kept = dict(question)
    for key in ("question", "answer"):
        if isinstance(kept.get(key), str):
            kept[key] = fold(kept[key])
    for key in ("answers", "choices"):
        if key in kept:
            kept[key] = [fold(text) for text in kept[key]]
    return kept


def clean_caption(text: str, *, max_words: int = MAX_WORDS) -> str:
    """LAVIS's `blip_caption`: lower case, a space for each of . ! " ( ) * # : ; ~, 50 words."""
    text = _PUNCTUATION.sub(" ", text.lower())
    text = _SPACES.sub(" ", text).rstrip("\n").strip(" ")
    return _first_words(text, max_words)


def clean_question(text: str, *, max_words: int = MAX_WORDS) -> str:
    """LAVIS's `blip_question`: lower case, the same characters deleted, 50 words."""
    return _first_words(_PUNCTUATION.sub("", text.lower()).rstrip(" "), max_words)


def split_prefix(text: str, rng: np.random.Generator) -> tuple[str, str]:
    """Cuts a caption in two for an encoder-decoder LLM (paper, section 3.3, figure 3).

    The cut is drawn uniformly from after the first word to the middle of the text, as the
    authors say; whether they count words or tokens they do not say. Words here, so that no word
    is torn.

    Returns:
      prefix (for the encoder) and suffix (for the decoder, never empty). A text of one word has
      an empty prefix.
    """
    pieces = text.split()
    if len(pieces) < 2:
        return "", text
    cut = int(rng.integers(1, len(pieces) // 2 + 1))
    return " ".join(pieces[:cut]), " ".join(pieces[cut:])
