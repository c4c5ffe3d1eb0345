"""Captions of the embedded world are scored by what is true of a scene, and cut as others are."""

import numpy as np
import pytest

from blip2_jax.digits import world
from blip2_jax.evals.metrics import captioning, truth


def test_facts_correct_is_the_share_of_captions_that_are_true():
    rng = np.random.default_rng(1)
    scenes = {i: world.sample_scene(rng) for i in range(4)}
    captions = {i: world.describe(scene, rng) for i, scene in scenes.items()}
    checks = {i: truth.truth_check({"scene": world.scene_to_json(s)}) for i, s in scenes.items()}
    assert captioning.facts_metrics(captions, checks) == {"facts_correct": 1.0}
    captions[2] = "a dog"
    assert captioning.facts_metrics(captions, checks) == {"facts_correct": 0.75}
    assert truth.truth_check({"captions": ["a dog"]}) is None


@pytest.mark.integration
@pytest.mark.skipif(not captioning.has_java(), reason="needs Java")
def test_tokenizers_agree_on_the_embedded_world():
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(100):
        texts += world.captions(world.sample_scene(rng), rng, 3)
    texts += ["", "  ", "two\nlines", "caf\u00e9 \u2028 na\u00efve"]
    with_java, used = captioning.tokenize(texts)
    assert used == "ptb"
    assert with_java == captioning.tokenize(texts, tokenizer="fallback")[0]
    assert with_java[-4:] == ["", "", "two lines", "caf\u00e9 na\u00efve"]
