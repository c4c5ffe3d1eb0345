"""Recall and re-ranking equal their definitions, ties and repeated texts included."""

import numpy as np
import pytest

from blip2_jax.evals import retrieval


def slow_recalls(scores, owner):
    """Ranks by sorting with every right candidate behind the wrong ones of equal score."""
    found = {}
    for way, matrix in (("image_to_text", scores), ("text_to_image", scores.T)):
        ranks = []
        for q, row in enumerate(matrix):
            right = owner == q if way == "image_to_text" else np.arange(len(row)) == owner[q]
            order = sorted(range(len(row)), key=lambda c: (-row[c], right[c]))
            ranks.append(min(place for place, c in enumerate(order) if right[c]))
        for k in (1, 5, 10):
            found[f"{way}_r{k}"] = np.mean([rank < k for rank in ranks])
    return found


@pytest.mark.parametrize("levels", [3, 20, 10**6])  # from almost all ties to none
def test_recall_equals_sorting_with_ties_and_several_texts(levels):
    rng = np.random.default_rng(levels)
    owner = rng.permutation(np.concatenate([np.arange(15), rng.integers(15, size=25)]))
    scores = rng.integers(levels, size=(15, 40)) / levels
    scores[owner, np.arange(40)] += 0.3
    metrics = retrieval.recall_metrics(scores, owner)
    assert metrics.pop("candidates") == 15 and metrics.pop("candidate_texts") == 40
    assert metrics == pytest.approx(slow_recalls(scores, owner))


def test_equal_scores_are_worth_nothing():
    metrics = retrieval.recall_metrics(np.zeros((20, 20)), np.arange(20))
    assert all(metrics[f"{way}_r10"] == 0.0 for way in ("image_to_text", "text_to_image"))


def test_the_best_of_an_images_texts_counts():
    scores = np.array([[0.1, 0.9, 0.5], [0.2, 0.3, 0.4]])
    metrics = retrieval.recall_metrics(scores, [0, 0, 1])
    assert metrics["image_to_text_r1"] == 1.0  # image 0 is found by its second text
    assert metrics["text_to_image_r1"] == pytest.approx(1 / 3)  # only text 1 finds its image


def test_each_direction_can_have_its_own_scores():
    metrics = retrieval.recall_metrics(np.eye(3), np.arange(3), scores_t2i=-np.eye(3))
    assert metrics["image_to_text_r1"] == 1.0 and metrics["text_to_image_r1"] == 0.0


@pytest.mark.parametrize(("k", "batch_size"), [(1, 4), (3, 7), (5, 64), (100, 16)])
def test_rerank_equals_brute_force(k, batch_size):
    rng = np.random.default_rng(k)
    itc = rng.choice(rng.random(30), size=(6, 9)).astype(np.float32)  # with ties
    logits = rng.normal(size=itc.shape).astype(np.float32) * 5
    calls = []

    def itm(image_idx, text_idx):
        calls.append(np.stack([image_idx, text_idx], 1))
        return logits[image_idx, text_idx]

    i2t, t2i = retrieval.rerank(itc, itm, k, batch_size=batch_size, progress=False)
    for got, sims, extra in ((i2t, itc, logits), (t2i, itc.T, logits.T)):
        expected = np.full(sims.shape, -100.0, np.float32)
        for q, row in enumerate(sims):
            for c in sorted(range(len(row)), key=lambda c: -row[c])[:k]:
                expected[q, c] = extra[q, c] + row[c]
        np.testing.assert_array_equal(got, expected)

    assert {call.shape for call in calls} == {(batch_size, 2)}  # one shape: compiled once
    wanted = int(np.count_nonzero((i2t > -100) | (t2i.T > -100)))
    assert len(calls) == -(-wanted // batch_size)  # a pair of both directions is read once


def test_rerank_shows_progress_in_pairs(capfd):
    retrieval.rerank(np.eye(3), lambda i, t: np.zeros(len(i)), 1, batch_size=2)
    assert "3/3" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("scores", "owner", "message"),
    [
        (np.array([[np.nan, 1.0]]), [0, 0], "1 entries that are NaN"),
        (np.eye(2), [0, 2], "below 2 for scores"),
        (np.eye(2), [0], "text_to_image must be"),
        (np.eye(2), [], "text_to_image must be"),
        (np.eye(2), [0, 0], r"1 images have no text \(1\)"),
        (np.zeros((0, 0)), [], "non-empty"),
    ],
)
def test_bad_scores_are_named(scores, owner, message):
    with pytest.raises(ValueError, match=message):
        retrieval.recall_metrics(scores, owner)


def test_bad_itm_outputs_are_named():
    with pytest.raises(ValueError, match=r"shape \(4, 2\), expected \(4,\)"):
        retrieval.rerank(
            np.eye(2), lambda i, t: np.zeros((len(i), 2)), 2, batch_size=4, progress=False
        )
    with pytest.raises(ValueError, match="logits that are NaN"):
        retrieval.rerank(np.eye(2), lambda i, t: i * np.nan, 2, batch_size=4, progress=False)
    with pytest.raises(ValueError, match="k=0"):
        retrieval.rerank(np.eye(2), lambda i, t: np.zeros(len(i)), 0)
