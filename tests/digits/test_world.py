"""Captions of a scene are true, false claims are found, unseen combinations stay unseen."""

import itertools

import numpy as np
import pytest

from blip2_jax.digits import stories, world


def scenes(n, **kwargs):
    rng = np.random.default_rng(0)
    return [world.sample_scene(rng, **kwargs) for _ in range(n)]


def test_scenes_keep_their_rules():
    for scene in scenes(500):
        assert 1 <= len(scene) <= 3
        for values in zip(*scene, strict=True):
            if values[0] not in world.SIZES:
                assert len(set(values)) == len(scene)  # digits, colors, places are distinct
        assert not any((t.digit, t.color) in world.UNSEEN_COMBINATIONS for t in scene)
        assert world.scene_from_json(world.scene_to_json(scene)) == scene
    for scene in scenes(200, unseen=True):
        assert any((t.digit, t.color) in world.UNSEEN_COMBINATIONS for t in scene)


def test_every_caption_is_true_and_parses():
    rng = np.random.default_rng(1)
    for scene in scenes(500):
        said = [*world.captions(scene, rng, 5), world.describe(scene, rng)]
        assert len(set(said[:5])) == 5
        for text in said:
            assert world.facts_correct(text, scene), (text, scene)
            assert world.facts_correct(f" {text.capitalize()}. ", scene)


def test_any_false_claim_makes_a_caption_false():
    """Each attribute of each thing, changed alone, is noticed where the caption names it."""
    rng = np.random.default_rng(2)
    noticed = 0
    for scene in scenes(300):
        text = world.describe(scene, rng)
        i = rng.integers(len(scene))
        others = {
            "digit": [d for d in range(10) if d not in {t.digit for t in scene}],
            "color": [c for c in world.COLORS if c != scene[i].color],
            "size": [s for s in world.SIZES if s != scene[i].size],
            "place": [p for p in world.PLACES if p != scene[i].place],
        }
        for field, values in others.items():
            changed = list(scene)
            changed[i] = scene[i]._replace(**{field: values[rng.integers(len(values))]})
            assert not world.facts_correct(text, tuple(changed)), (text, changed)
            noticed += 1
    assert noticed == 1200


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog on a beach",
        "a red 3 and",
        "a red 3 a blue 7",
        "three digits: a red 3 and a blue 7",  # there are two
        "a red 3 to the right of a blue 7",
        "a blue 7 above a red 3",
        "a red 3 and a red 3",
    ],
)
def test_what_is_not_a_true_caption_is_not_correct(text):
    three = world.Thing(3, "red", "small", "top left")
    scene = (three, world.Thing(7, "blue", "large", "top right"))
    assert world.facts_correct("a small red 3 to the left of a blue 7", scene)
    assert not world.facts_correct(text, scene)


def test_questions_are_answered_by_their_scene():
    rng = np.random.default_rng(3)
    answers = {"yes": 0, "no": 0}
    for scene in scenes(400):
        asked = world.questions(scene, rng)
        assert [q.type for q in asked] == list(world.QUESTION_TYPES)
        by_type = {q.type: q for q in asked}
        assert by_type["count"].answer == world.COUNTS[len(scene) - 1]
        words = by_type["exist"].question.rstrip("?").split()
        there = (words[-2], int(words[-1])) in {(t.color, t.digit) for t in scene}
        assert by_type["exist"].answer == ("yes" if there else "no")
        answers[by_type["exist"].answer] += 1
        digit = int(by_type["color"].question.split(" the ")[1].split("?")[0].split()[0])
        assert by_type["color"].answer == {t.digit: t.color for t in scene}[digit]
    assert 0.4 < answers["yes"] / 400 < 0.6


def test_text_never_names_an_unseen_combination():
    """Neither in captions nor in questions, where 'no' would otherwise be the answer to all."""
    rng = np.random.default_rng(4)
    named = {f"{color} {digit}" for digit, color in world.UNSEEN_COMBINATIONS}
    for _ in range(2000):
        text = " ".join(stories.story(rng))
        assert not any(name in text for name in named), text


def test_articles_are_those_of_english():
    rng = np.random.default_rng(7)
    for scene in scenes(200):
        asked = [question.question for question in world.questions(scene, rng)]
        for text in world.captions(scene, rng, 3) + asked:
            words = text.replace(",", "").replace("?", "").split()
            for article, word in itertools.pairwise(words):
                if article in ("a", "an") and word != "picture":
                    vowel = word.startswith(("orange", "8", "image"))
                    assert article == ("an" if vowel else "a"), text


def test_an_unknown_type_of_question_is_an_error():
    with pytest.raises(ValueError, match="color, digit"):
        world.ask(scenes(1)[0], "weight", np.random.default_rng(0))
