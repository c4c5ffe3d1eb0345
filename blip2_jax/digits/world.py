"""The embedded world as text: scenes of digits, and true captions, questions and answers of them.

A scene holds one to three handwritten digits. Each has a color, a size and a place, and digits,
colors and places are distinct within a scene, so that "the 3" or "the red digit" is one thing.
This module knows nothing of pixels (`drawing` draws) and nothing of models. It writes

* captions, in varied wording, and reads them back (`parse_caption`), so that a generated caption
  can be scored fact by fact;
* questions with answers, by type.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

COLORS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")
SIZES = ("small", "large")
PLACES = ("top left", "top right", "bottom left", "bottom right")
COUNTS = ("one", "two", "three")
QUESTION_TYPES = ("color", "digit", "size", "place", "count", "exist")

# One color in eight of every digit never occurs in training, neither in images nor in text.
UNSEEN_COMBINATIONS = frozenset(
    (digit, COLORS[(3 * digit + 1) % len(COLORS)]) for digit in range(10)
)

# How many digits a scene holds: the share of scenes with one, two and three.
COUNT_SHARES = (0.25, 0.5, 0.25)


class Thing(NamedTuple):
    """One digit of a scene; in a parsed caption, None is what the caption does not name."""

    digit: int
    color: str | None
    size: str | None
    place: str | None

    @property
    def corner(self) -> list[str]:
        """The two words of the place: "top" or "bottom", and "left" or "right".

        Raises:
          ValueError: there is no place.
        """
        if self.place is None:
            raise ValueError(f"This digit has no place: {self}.")
        return self.place.split()


Scene = tuple[Thing, ...]


class Question(NamedTuple):
    """A question of one of the `QUESTION_TYPES`, with its only right answer."""

    question: str
    answer: str
    type: str


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What a caption claims: things, how many there are (or None), and who is where of whom."""

    things: tuple[Thing, ...]
    count: int | None
    relations: tuple[tuple[int, str, int], ...]


# ---------------------------------------------------------------------------------------- scenes


def sample_scene(rng: np.random.Generator, *, unseen: bool = False, max_things: int = 3) -> Scene:
    """Draws a scene of at most `max_things` things.

    Args:
      rng: the only source of randomness.
      unseen: whether at least one thing is of `UNSEEN_COMBINATIONS`; otherwise none is.
      max_things: 1 to 3; lower values give the easier scenes that a curriculum begins with.
    """
    shares = np.array(COUNT_SHARES[:max_things])
    while True:
        count = 1 + rng.choice(max_things, p=shares / shares.sum())
        digits = rng.permutation(10)[:count]
        colors = rng.permutation(len(COLORS))[:count]
        quadrants = rng.permutation(len(PLACES))[:count]
        scene = tuple(
            Thing(int(d), COLORS[c], SIZES[rng.integers(2)], PLACES[p])
            for d, c, p in zip(digits, colors, quadrants, strict=True)
        )
        if any((t.digit, t.color) in UNSEEN_COMBINATIONS for t in scene) == unseen:
            return scene


def scene_to_json(scene: Scene) -> str:
    """A list of objects with the fields of `Thing`."""
    return json.dumps([t._asdict() for t in scene])


def scene_from_json(text: str) -> Scene:
    """Undoes `scene_to_json`."""
    return tuple(Thing(**fields) for fields in json.loads(text))


# -------------------------------------------------------------------------------------- captions


def _adjectives(*adjectives: str | None) -> str:
    return "".join(f"{w} " for w in adjectives if w)


def _a(phrase: str) -> str:
    """A phrase with its article: a red 3, an orange 3, an 8."""
    return f"an {phrase}" if phrase.startswith(("orange", "8")) else f"a {phrase}"


def _phrase(thing: Thing, form: str) -> str:
    """One noun phrase; attributes that are None are left out."""
    digit, color, size, quadrant = thing
    where = f" in the {quadrant}" if quadrant else ""
    if form == "plain":  # a large red 3 in the top left
        return f"{_a(f'{_adjectives(size, color)}{digit}')}{where}"
    if form == "colored":  # a large 3 in red in the top left
        return f"{_a(f'{_adjectives(size)}{digit}')}{f' in {color}' if color else ''}{where}"
    if form == "placed":  # in the top left a large red 3
        return f"{where.strip()} {_phrase(thing._replace(place=None), 'plain')}".strip()
    if form == "clause":  # the 3 in the top left is large and red
        adjectives = [word for word in (size, color) if word]
        return f"the {digit}{where} is {' and '.join(adjectives)}"
    raise ValueError(form)


FORMS = ("plain", "colored", "placed", "clause")
_HEADS = ("", "there is ", "a picture of ", "an image with ")


def _join(phrases: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))


def _shuffled(scene: Scene, rng: np.random.Generator) -> list[Thing]:
    return [scene[i] for i in rng.permutation(len(scene))]


def pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """A full caption: each thing with its size, color and place."""
    form = pick(rng, FORMS)
    return _join([_phrase(thing, form) for thing in _shuffled(scene, rng)])


def _relation(first: Thing, second: Thing, rng: np.random.Generator) -> str:
    """Where `first` is relative to `second`; one of the two relations where both hold."""
    (row1, column1), (row2, column2) = first.corner, second.corner
    relations = []
    if column1 != column2:
        relations.append(f"to the {column1} of")
    if row1 != row2:
        relations.append("above" if row1 == "top" else "below")
    return pick(rng, relations)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One true caption in one of several wordings.

    It names two things at most, and may leave sizes and places out.
    """
    things = _shuffled(scene, rng)[:2]
    if len(things) > 1 and rng.random() < 0.25:
        pair = [t._replace(place=None, size=pick(rng, (t.size, None))) for t in things[:2]]
        return (
            f"{_phrase(pair[0], 'plain')} {_relation(things[0], things[1], rng)} "
            f"{_phrase(pair[1], 'plain')}"
        )
    keep_size, keep_place = rng.random(2) < 0.6
    described = [
        t._replace(size=t.size if keep_size else None, place=t.place if keep_place else None)
        for t in things
    ]
    form = pick(rng, FORMS)
    phrases = _join([_phrase(thing, form) for thing in described])
    if form in ("plain", "colored"):
        heads: tuple[str, ...] = _HEADS
        if len(things) == len(scene):
            heads = (*heads, f"{COUNTS[len(scene) - 1]} digit{'s' if len(scene) > 1 else ''}: ")
        return pick(rng, heads) + phrases
    return phrases


def captions(scene: Scene, rng: np.random.Generator, n: int) -> list[str]:
    """`n` different captions of one scene."""
    different: dict[str, None] = {}
    while len(different) < n:
        different[caption(scene, rng)] = None
    return list(different)


def _options(options: Iterable[str]) -> str:
    return "|".join(map(str, options))


_C, _S, _P = _options(COLORS), _options(SIZES), _options(PLACES)
_THING = re.compile(
    rf"(?:in the (?P<place1>{_P}) )?an? (?:(?P<size1>{_S}) )?(?:(?P<color1>{_C}) )?(?P<digit1>\d)"
    rf"(?: in (?P<color2>{_C}))?(?: in the (?P<place2>{_P}))?(?![\w])"
    rf"|the (?P<digit2>\d)(?: in the (?P<place3>{_P}))? is "
    rf"(?:(?P<size2>{_S}) and )?(?P<adjective>{_C}|{_S})(?![\w])"
)
_BETWEEN = {
    "to the left of": "left",
    "to the right of": "right",
    "above": "above",
    "below": "below",
}
_CAPTION = re.compile(
    rf"(?:{_options(h for h in _HEADS if h)}|(?P<count>{_options(COUNTS)}) digits?: )?"
    rf"@(?:(?:, | and )@)*|@ (?P<relation>{_options(_BETWEEN)}) @"
)


def parse_caption(text: str) -> Parsed | None:
    """Reads a caption of this world's grammar; None if it is not one."""
    text = " ".join(text.lower().split()).rstrip(" .")
    things = []
    for match in _THING.finditer(text):
        groups = match.groupdict()
        adjective = groups["adjective"]
        things.append(
            Thing(
                int(groups["digit1"] or groups["digit2"]),
                groups["color1"]
                or groups["color2"]
                or (adjective if adjective in COLORS else None),
                groups["size1"] or groups["size2"] or (adjective if adjective in SIZES else None),
                groups["place1"] or groups["place2"] or groups["place3"],
            )
        )
    whole = _CAPTION.fullmatch(_THING.sub("@", text))
    if whole is None:
        return None
    count = COUNTS.index(whole["count"]) + 1 if whole["count"] else None
    relations: tuple[tuple[int, str, int], ...] = ()
    if whole["relation"]:
        relations = ((things[0].digit, _BETWEEN[whole["relation"]], things[1].digit),)
    return Parsed(tuple(things), count, relations)


def facts_correct(text: str, scene: Scene) -> bool:
    """Whether `text` is a caption of this grammar and every single claim of it holds in `scene`."""
    parsed = parse_caption(text)
    if parsed is None or parsed.count not in (None, len(scene)):
        return False
    true = {thing.digit: thing for thing in scene}
    if len({claim.digit for claim in parsed.things}) < len(parsed.things):
        return False  # digits are distinct in a scene: naming one twice is a false count
    for claim in parsed.things:
        if claim.digit not in true:
            return False
        if any(a is not None and a != b for a, b in zip(claim, true[claim.digit], strict=True)):
            return False
    for first, relation, second in parsed.relations:
        (row1, column1), (row2, column2) = (true[d].corner for d in (first, second))
        holds = {
            "left": (column1, column2) == ("left", "right"),
            "right": (column1, column2) == ("right", "left"),
            "above": (row1, row2) == ("top", "bottom"),
            "below": (row1, row2) == ("bottom", "top"),
        }
        if not holds[relation]:
            return False
    return True


# ------------------------------------------------------------------------------------- questions


def ask(scene: Scene, type: str, rng: np.random.Generator) -> Question:
    """One question of a type (`QUESTION_TYPES`) with its answer.

    Existence is asked half the time of something that is there. What is not there is, where the
    scene allows, a swap: the color of one thing with the digit of another, so that knowing the
    colors and the digits is not enough.
    """
    thing = pick(rng, scene)
    name = pick(rng, (f"the {thing.digit}", f"the {thing.color} digit"))
    if type == "color":
        form = pick(rng, ("what color is the {}?", "which color does the {} have?"))
        return Question(form.format(thing.digit), thing.color, type)
    if type == "digit":
        forms = ("which digit is {0}?", "what is the {0} digit?", "which digit is in the {1}?")
        form = pick(rng, forms)
        return Question(form.format(thing.color, thing.place), str(thing.digit), type)
    if type == "size":
        form = pick(rng, ("is {} small or large?", "what size is {}?", "how big is {}?"))
        return Question(form.format(name), thing.size, type)
    if type == "place":
        form = pick(rng, ("where is {}?", "in which corner is {}?"))
        return Question(form.format(name), thing.place, type)
    if type == "count":
        form = pick(rng, ("how many digits are there?", "how many digits can you see?"))
        return Question(form, COUNTS[len(scene) - 1], type)
    if type == "exist":
        form = pick(rng, ("is there {}?", "can you see {}?"))
        if rng.random() < 0.5:
            return Question(form.format(_a(f"{thing.color} {thing.digit}")), "yes", type)
        color, digit = _absent(scene, thing, rng)
        return Question(form.format(_a(f"{color} {digit}")), "no", type)
    raise ValueError(f"Unknown question type {type!r}; known: {', '.join(QUESTION_TYPES)}.")


def _absent(scene: Scene, thing: Thing, rng: np.random.Generator) -> tuple[str, int]:
    """A (color, digit) that `scene` does not hold, near to what it does hold.

    Never one of `UNSEEN_COMBINATIONS`: text must not teach that these are never there.
    """
    there = UNSEEN_COMBINATIONS.union((t.digit, t.color) for t in scene)
    swaps = [(t.color, thing.digit) for t in scene if (thing.digit, t.color) not in there]
    if swaps and rng.random() < 0.7:
        return pick(rng, swaps)
    while True:
        other_color = (pick(rng, COLORS), thing.digit)
        other_digit = (thing.color, int(rng.integers(10)))
        color, digit = pick(rng, (other_color, other_digit))
        if (digit, color) not in there:
            return color, digit


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One question of every type."""
    return [ask(scene, type, rng) for type in QUESTION_TYPES]
