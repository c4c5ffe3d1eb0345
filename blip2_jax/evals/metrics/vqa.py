"""Visual question answering: the VQA accuracy in both forms in use, and GQA's exact match.

The VQA accuracy of one answer is the mean over the annotators of min(1, matches / 3), matches
counted among the other annotators (Antol et al. 2015, and visualqa.org/evaluation). What counts
as a match depends on the normalization of texts, of which two forms are in use:

    form      prediction                       annotators' answers
    official  punctuation, digits, articles    the same           both only if annotators disagree
    lavis     punctuation, digits, articles    punctuation only   answers only if they disagree

`official` is the VQA server's script. `lavis` is the copy that BLIP-2's published numbers were
made with: it normalizes the prediction always and never maps number words or articles of the
answers, so that "two" is wrong where all annotators said "two".
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from blip2_jax.evals.metrics import check_ids

FORMS = ("official", "lavis")
ANNOTATORS = 10  # of VQA; a question with a single answer counts as this many who agree

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
# As published: "(?!<=\d)" was meant as the look-behind "(?<!\d)" and, in front of a period, always
# holds; and `re.UNICODE`, whose value is 32, was passed as the number of substitutions.
_PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")
_PERIODS_AT_MOST = 32
_NUMBERS = {
    word: str(max(0, n - 1))
    for n, word in enumerate("none zero one two three four five six seven eight nine ten".split())
}
_ARTICLES = ("a", "an", "the")

# The published table as "written=meant". Its oddities stay: "somebody'd" loses its apostrophe,
# and keys with a capital never match, since texts are in lower case by then.
CONTRACTIONS = dict(
    pair.split("=")
    for pair in """
    aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've
    couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've
    hadn'tve=hadn't've hasnt=hasn't havent=haven't hed=he'd hed've=he'd've he'dve=he'd've hes=he's
    howd=how'd howll=how'll hows=how's Id've=I'd've I'dve=I'd've Im=I'm Ive=I've isnt=isn't itd=it'd
    itd've=it'd've it'dve=it'd've itll=it'll let's=let's maam=ma'am mightnt=mightn't
    mightnt've=mightn't've mightn'tve=mightn't've mightve=might've mustnt=mustn't mustve=must've
    neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at 'ows'at='ow's'at
    'ow'sat='ow's'at shant=shan't shed've=she'd've she'dve=she'd've she's=she's shouldve=should've
    shouldnt=shouldn't shouldnt've=shouldn't've shouldn'tve=shouldn't've somebody'd=somebodyd
    somebodyd've=somebody'd've somebody'dve=somebody'd've somebodyll=somebody'll
    somebodys=somebody's someoned=someone'd someoned've=someone'd've someone'dve=someone'd've
    someonell=someone'll someones=someone's somethingd=something'd somethingd've=something'd've
    something'dve=something'd've somethingll=something'll thats=that's thered=there'd
    thered've=there'd've there'dve=there'd've therere=there're theres=there's theyd=they'd
    theyd've=they'd've they'dve=they'd've theyll=they'll theyre=they're theyve=they've twas='twas
    wasnt=wasn't wed've=we'd've we'dve=we'd've weve=we've werent=weren't whatll=what'll
    whatre=what're whats=what's whatve=what've whens=when's whered=where'd wheres=where's
    whereve=where've whod=who'd whod've=who'd've who'dve=who'd've wholl=who'll whos=who's
    whove=who've whyll=why'll whyre=why're whys=why's wont=won't wouldve=would've wouldnt=wouldn't
    wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll y'allll=y'all'll
    yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've
    you'dve=you'd've youll=you'll youre=you're youve=you've
""".split()
)


def _strip(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize_punctuation(text: str) -> str:
    """Removes or spaces out punctuation, as the VQA script does.

    A mark is deleted where `text` holds it next to a space (anywhere), or holds a comma between
    digits; otherwise it becomes a space: "t-shirt" -> "t shirt", "1,000" -> "1000". Periods go
    unless a digit follows: "3.5" stays, "dr. smith" -> "dr smith".
    """
    delete_all = _DIGIT_COMMA.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        delete = delete_all or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if delete else " ")
    return _PERIOD.sub("", result, count=_PERIODS_AT_MOST)


def normalize_words(text: str) -> str:
    """Lower case, number words to digits, no articles, apostrophes back into contractions."""
    tokens = (_NUMBERS.get(token, token) for token in text.lower().split())
    return " ".join(CONTRACTIONS.get(token, token) for token in tokens if token not in _ARTICLES)


def normalize_answer(text: str) -> str:
    """The whole normalization: white space, punctuation, then words."""
    return normalize_words(normalize_punctuation(_strip(text)))


def answer_accuracy(prediction: str, answers: Sequence[str], *, form: str = "official") -> float:
    """VQA accuracy of one prediction, 0..1.

    Args:
      prediction: the answer given.
      answers: one answer per annotator; a single one counts as ten annotators who agree.
      form: "official" or "lavis" (see the module's text).
    """
    if form not in FORMS:
        raise ValueError(f"Unknown form of VQA accuracy {form!r}; known: {', '.join(FORMS)}.")
    if isinstance(answers, str) or not answers:
        raise ValueError(f"`answers` must be a non-empty list of texts, got {answers!r}.")
    answers = list(answers) * ANNOTATORS if len(answers) == 1 else list(answers)
    if form == "official":
        answers, prediction = [_strip(answer) for answer in answers], _strip(prediction)
        if len(set(answers)) > 1:
            answers = [normalize_answer(answer) for answer in answers]
            prediction = normalize_answer(prediction)
    else:
        prediction = normalize_answer(prediction)
        if len(set(answers)) > 1:
            answers = [normalize_punctuation(answer) for answer in answers]
    matches, total = answers.count(prediction), len(answers)
    # Leaving out one of the `matches` annotators who agree leaves one match fewer.
    agreeing = matches * min(1.0, (matches - 1) / 3)
    others = (total - matches) * min(1.0, matches / 3)
    return (agreeing + others) / total


def vqa_metrics(
    predictions: Mapping[Any, str],
    questions: Sequence[Mapping[str, Any]],
    *,
    form: str = "official",
) -> dict[str, float]:
    """VQA accuracy over a split, and for every type of question.

    Args:
      predictions: answer by question id.
      questions: each {"id", "answers": [str, ...] or "answer": str} and, optionally, "type".
      form: "official" or "lavis" (see the module's text).

    Returns:
      The accuracy, 0 to 1, as "accuracy", and that of each type of question by its name.

    Raises:
      ValueError: predictions for unknown ids or missing ones (the first few are named), an id
        twice, a question without answers, a type called "accuracy".
    """
    _check_questions(predictions, questions)
    scores = {
        q["id"]: answer_accuracy(predictions[q["id"]], _answers(q), form=form) for q in questions
    }
    return _by_type(scores, questions)


def gqa_metrics(
    predictions: Mapping[Any, str], questions: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """GQA accuracy (Hudson & Manning 2019): exact match after normalizing both sides.

    Args, returns and raises as `vqa_metrics`; each question has a single answer.
    """
    _check_questions(predictions, questions)
    scores = {}
    for question in questions:
        answers = _answers(question)
        if len(answers) != 1:
            raise ValueError(
                f"Question {question['id']!r} has {len(answers)} answers; exact match needs one. "
                "Use `vqa_metrics` for several annotators."
            )
        same = normalize_answer(predictions[question["id"]]) == normalize_answer(answers[0])
        scores[question["id"]] = float(same)
    return _by_type(scores, questions)


def lemmatize(texts: Sequence[str]) -> list[str]:
    """Nouns and verbs of answers in their basic form, as for OK-VQA's published scores (LAVIS).

    Raises:
      ValueError: spaCy or its English model is not installed.
    """
    try:
        import spacy

        nlp = spacy.load("en_core_web_sm")
    except (ImportError, OSError) as error:
        raise ValueError(
            f"Lemmatizing needs spaCy and its English model ({error}). Run pip install spacy && "
            "python -m spacy download en_core_web_sm, or set lemmatize=False, which scores lower."
        ) from error
    return [
        " ".join(word.lemma_ if word.pos_ in ("NOUN", "VERB") else word.text for word in doc)
        for doc in nlp.pipe(texts)
    ]


def _answers(question: Mapping[str, Any]) -> list[str]:
    answers = question.get("answers") or [question.get("answer")]
    if isinstance(answers, str) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(
            f"Question {question['id']!r} has no usable answers ({answers!r}): give `answers`, a "
            "list of texts, or `answer`, one text."
        )
    return list(answers)


def _check_questions(
    predictions: Mapping[Any, str], questions: Sequence[Mapping[str, Any]]
) -> None:
    ids = [question["id"] for question in questions]
    check_ids(predictions, ids, "questions")
    repeated, times = Counter(ids).most_common(1)[0]
    if times > 1:
        raise ValueError(f"Question id {repeated!r} occurs {times} times: ids must be unique.")


def _by_type(
    scores: Mapping[Any, float], questions: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    by_type = defaultdict(list)
    for question in questions:
        if question.get("type") is not None:
            by_type[question["type"]].append(scores[question["id"]])
    if "accuracy" in by_type:
        raise ValueError('A question type is called "accuracy", the name of the mean: rename it.')
    overall = {"accuracy": sum(scores.values()) / len(scores)}
    return overall | {
        name: sum(of_type) / len(of_type) for name, of_type in sorted(by_type.items())
    }
