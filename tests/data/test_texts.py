"""Captions and questions as LAVIS cleans them, and T5's split."""

import numpy as np
import pytest

from blip2_jax.data import texts


@pytest.mark.parametrize(
    ("said", "cleaned"),
    [
        ("A Cat.", "a cat"),
        ('Two dogs -- "big" ones -- play!', "two dogs -- big ones -- play"),
        ("a (red) car: #1; ~5 * 2", "a red car 1 5 2"),
        ("it's a dog's life, isn't it?", "it's a dog's life, isn't it?"),
        ("line\n", "line"),
        ("a\tb", "a\tb"),  # one tab is no run of spaces
        ("  x   y  ", "x y"),
        ("...", ""),
        ("ONE " * 60, " ".join(["one"] * 50)),
    ],
)
def test_captions(said, cleaned):
    assert texts.clean_caption(said) == cleaned


def test_white_space_is_folded():
    assert texts.fold(" a\tcat\r\n\non a\u00a0mat\0 \x85") == "a cat on a mat"
    record = {
        "captions": ["one\ntwo"],
        "questions": [{"question": "a\nb", "answers": ["c\nd"], "question_id": 1}],
        "url": "x\ny",
    }
    assert texts.folded(record) == {
        "captions": ["one two"],
        "questions": [{"question": "a b", "answers": ["c d"], "question_id": 1}],
        "url": "x\ny",
    }
    assert record["captions"] == ["one\ntwo"]


@pytest.mark.parametrize(
    ("asked", "cleaned"),
    [
        ("What's this?", "what's this?"),
        ("Is it 3:00 p.m.? ", "is it 300 pm?"),  # deleted, not replaced by a space
        ("one  two", "one  two"),
        ("w " * 60, " ".join(["w"] * 50)),
    ],
)
def test_questions(asked, cleaned):
    assert texts.clean_question(asked) == cleaned


def test_prefixes_end_between_the_first_word_and_the_middle():
    rng = np.random.default_rng(0)
    text = "one two three four five six seven"
    drawn = [texts.split_prefix(text, rng) for _ in range(600)]
    assert all(f"{prefix} {suffix}" == text for prefix, suffix in drawn)
    counts = np.bincount([len(prefix.split()) for prefix, _ in drawn])
    assert counts[0] == 0 and len(counts) == 4 and (counts[1:] > 150).all()  # uniform over 1, 2, 3
    assert texts.split_prefix("one two", rng) == ("one", "two")
    assert texts.split_prefix("one", rng) == ("", "one")
