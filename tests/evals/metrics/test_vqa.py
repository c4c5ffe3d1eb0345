"""VQA accuracy equals the published rules, read a second time and literally."""

import hashlib
import json
import re

import numpy as np
import pytest

from blip2_jax.evals.metrics import vqa

# ------------------------------------------------------- a second, literal reading of the rules

NUMBERS = dict(none="0", zero="0", one="1", two="2", three="3", four="4", five="5", six="6")
NUMBERS |= dict(seven="7", eight="8", nine="9", ten="10")
MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@"]
MARKS += ["`", ",", "?", "!"]


def literal_punctuation(text):
    comma = any(
        text[i] == "," and text[i - 1].isdigit() and text[i + 1].isdigit()
        for i in range(1, len(text) - 1)
    )
    out = text
    for mark in MARKS:
        if mark not in text:
            continue
        if comma or (mark + " ") in text or (" " + mark) in text:
            out = "".join(c for c in out if c != mark)
        else:
            out = "".join(" " if c == mark else c for c in out)
    kept, removed = [], 0
    for i, c in enumerate(out):
        if c == "." and not re.match(r"\d", out[i + 1 : i + 2]) and removed < 32:
            removed += 1
        else:
            kept.append(c)
    return "".join(kept)


def literal_words(text):
    out = []
    for word in text.lower().split():
        word = NUMBERS.get(word, word)
        if word in {"a", "an", "the"}:
            continue
        out.append(vqa.CONTRACTIONS.get(word, word))
    return " ".join(out)


def literal_accuracy(prediction, answers, form):
    prediction = prediction.replace("\n", " ").replace("\t", " ").strip()
    if form == "official":
        answers = [a.replace("\n", " ").replace("\t", " ").strip() for a in answers]
    differ = len(set(answers)) > 1
    if form == "lavis" or differ:
        prediction = literal_words(literal_punctuation(prediction))
    if differ:
        answers = [literal_punctuation(a) for a in answers]
        if form == "official":
            answers = [literal_words(a) for a in answers]
    scores = []
    for i in range(len(answers)):
        others = answers[:i] + answers[i + 1 :]
        scores.append(min(1, sum(other == prediction for other in others) / 3))
    return sum(scores) / len(scores)


PIECES = ["two", "a", "The", "None", "isnt", "dont", "couldn'tve", "red", "Dog", "t-shirt", "3.5"]
PIECES += ["1,000", "9:30", "dr.", "u.s.", "a-b", "yes", "no", "(x)", "10", "ten", "?", "/", ", "]
PIECES += ["!", ".", "\n", "\t", "\u0665", "\u00b2.", "somebody'd", "it's", "'", "_", "@", "\\"]


def random_answer(rng):
    glue = " " if rng.random() < 0.7 else ""
    return glue.join(PIECES[i] for i in rng.integers(len(PIECES), size=rng.integers(1, 4)))


@pytest.mark.parametrize("form", vqa.FORMS)
def test_accuracy_equals_a_literal_second_implementation(form):
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(10_000):
        pool = [random_answer(rng) for _ in range(rng.integers(1, 4))]
        answers = [pool[i] for i in rng.integers(len(pool), size=10)]
        prediction = pool[0] if rng.random() < 0.7 else random_answer(rng)
        expected = literal_accuracy(prediction, answers, form)
        found = vqa.answer_accuracy(prediction, answers, form=form)
        assert abs(found - expected) < 1e-9, (prediction, answers)
        seen.add(round(expected, 2))
    assert len(seen) >= 5  # right, wrong and everything between occurred


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("t-shirt", "t shirt"),
        ("a-b", "b"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("9:30", "9:30"),
        ("dr. smith", "dr smith"),
        ("isnt", "isn't"),
        ("  The Two\tdogs.\n", "2 dogs"),
        ("none", "0"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),  # the table's "Im" never matches: texts are in lower case by then
        ("x." * 33, "x" * 33 + "."),  # at most 32 periods go: `re.UNICODE` passed as the count
    ],
)
def test_measured_cases_of_normalization(text, normal):
    assert vqa.normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answers", "official", "lavis"),
    [
        ("two", ["two"] * 10, 1.0, 0.0),
        ("two", ["two"] * 9 + ["2"], 1.0, 0.3),  # lavis: only the tenth annotator says "2"
        ("a dog", ["a dog"] * 9 + ["cat"], 1.0, 0.0),
        ("yes", ["Yes"] * 10, 0.0, 0.0),  # unanimous: the official form does not normalize
        ("yes", ["Yes"] * 9 + ["no"], 1.0, 0.0),
        ("two", ["2"] * 10, 0.0, 1.0),
        ("a dog", ["dog"] * 10, 0.0, 1.0),
        ("dog", ["dog"] + ["cat"] * 9, 0.3, 0.3),  # 9 annotators see 1 match, one sees none
        ("dog", ["dog"] * 3 + ["cat"] * 7, 0.9, 0.9),  # 7 x 1 and 3 x 2/3
        ("dog", ["dog"] * 4 + ["cat"] * 6, 1.0, 1.0),
    ],
)
def test_where_the_two_forms_differ(prediction, answers, official, lavis):
    assert vqa.answer_accuracy(prediction, answers) == pytest.approx(official)
    assert vqa.answer_accuracy(prediction, answers, form="lavis") == pytest.approx(lavis)


def test_contractions_are_the_published_table():
    table = json.dumps(vqa.CONTRACTIONS, sort_keys=True).encode()
    assert hashlib.sha256(table).hexdigest() == (
        "52771f672b95913f862aae058e42219f9e1e4d7af64475a5cdf394301acf67a9"
    )


QUESTIONS = [
    {"id": 1, "question": "which digit is red?", "answer": "3", "type": "digit"},
    {"id": 2, "question": "which digit is blue?", "answer": "7", "type": "digit"},
    {"id": 3, "question": "where?", "answers": ["left"] * 3 + ["top"] * 7, "type": "place"},
]


def test_metrics_per_type_are_means_of_their_questions():
    metrics = vqa.vqa_metrics({1: "3", 2: "1", 3: "left"}, QUESTIONS)
    assert metrics == pytest.approx({"accuracy": 1.9 / 3, "digit": 0.5, "place": 0.9})


def test_a_single_answer_counts_as_ten_annotators_who_agree():
    assert vqa.answer_accuracy("3", ["3"]) == vqa.answer_accuracy("3", ["3"] * 10) == 1.0


def test_gqa_is_exact_match_after_normalizing_both_sides():
    questions = [{"id": i, "answer": a} for i, a in enumerate(["Two", "a dog", "red"])]
    metrics = vqa.gqa_metrics({0: "2", 1: "Dog.", 2: "dark red"}, questions)
    assert metrics == pytest.approx({"accuracy": 2 / 3})
    with pytest.raises(ValueError, match="2 answers"):
        vqa.gqa_metrics({0: "2"}, [{"id": 0, "answers": ["2", "3"]}])


@pytest.mark.parametrize(
    ("predictions", "questions", "message"),
    [
        ({1: "3", 2: "7"}, QUESTIONS, r"1 questions have no prediction \(3\)"),
        ({1: "", 2: "", 3: "", 9: ""}, QUESTIONS, r"1 predictions are for unknown .*\(9\)"),
        ({"1": "", "2": "", "3": ""}, QUESTIONS, "once as text and once as numbers"),
        ({}, [], "no questions to score"),
        ({1: "3"}, [QUESTIONS[0], QUESTIONS[0]], "id 1 occurs 2 times"),
        ({1: "3"}, [{"id": 1, "question": "?"}], "Question 1 has no usable answers"),
        ({1: "3"}, [{"id": 1, "answers": "3"}], "Question 1 has no usable answers"),
        ({1: "3"}, [{"id": 1, "answer": "3", "type": "accuracy"}], "rename"),
    ],
)
def test_bad_input_is_named(predictions, questions, message):
    with pytest.raises(ValueError, match=message):
        vqa.vqa_metrics(predictions, questions)


def test_an_unknown_form_is_named():
    with pytest.raises(ValueError, match="'strict'"):
        vqa.answer_accuracy("3", ["3"], form="strict")
