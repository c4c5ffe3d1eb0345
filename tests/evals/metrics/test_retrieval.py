"""Recall and re-ranking equal their definitions: ties, repeated texts, several processes."""

import numpy as np
import pytest

from blip2_jax.evals.metrics import retrieval


def slow_recalls(scores, owner, scores_t2i=None):
    """Ranks by sorting, with every right candidate behind the wrong ones of equal score."""
    recalls = {}
    scores_t2i = scores.T if scores_t2i is None else scores_t2i
    for way, matrix in (("image_to_text", scores), ("text_to_image", scores_t2i)):
        ranks = []
        for q, row in enumerate(matrix):
            right = owner == q if way == "image_to_text" else np.arange(len(row)) == owner[q]
            order = sorted(range(len(row)), key=lambda c: (-row[c], right[c]))
            ranks.append(min(rank for rank, c in enumerate(order) if right[c]))
        for k in (1, 5, 10):
            recalls[f"{way}_r{k}"] = np.mean([rank < k for rank in ranks])
    return recalls


def slow_rerank(itc, logits, k):
    """The published re-ranking, pair by pair, with -100 for what is no candidate."""
    both = []
    for sims, extra in ((itc, logits), (itc.T, logits.T)):
        final = np.full(sims.shape, -100.0, np.float32)
        for q, row in enumerate(sims):
            for c in sorted(range(len(row)), key=lambda c: -row[c])[:k]:
                final[q, c] = extra[q, c] + row[c]
        both.append(final)
    return both


def make_owner(rng, images, texts):
    return rng.permutation(
        np.concatenate([np.arange(images), rng.integers(images, size=texts - images)])
    )


def shared(function, parts, itc):
    """Calls `function(itc, image_numbers, gather)` for every process, all in step."""
    import threading

    count = len(parts)
    slots, results = [None] * count, [None] * count
    barrier = threading.Barrier(count)

    def process(index):
        def gather(x):
            slots[index] = x
            barrier.wait()
            stacked = np.stack(slots)
            barrier.wait()
            return stacked

        results[index] = function(itc[parts[index]], parts[index], gather)

    threads = [threading.Thread(target=process, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("levels", [3, 20, 10**6])  # from almost all ties to none
def test_recall_equals_sorting_with_ties_and_several_texts(levels, processes):
    rng = np.random.default_rng(levels)
    owner = make_owner(rng, 15, 40)
    scores = (rng.integers(levels, size=(15, 40)) / levels).astype(np.float32)
    scores[owner, np.arange(40)] += 0.3
    parts = [np.arange(15)[i::processes] for i in range(processes)]
    ranks = shared(lambda s, numbers, g: retrieval.ranks(s, numbers, owner, g), parts, scores)
    image_ranks = np.empty(15, int)
    for part, (part_ranks, text_ranks) in zip(parts, ranks, strict=True):
        image_ranks[part] = part_ranks
        np.testing.assert_array_equal(text_ranks, ranks[0][1])
    metrics = retrieval.recalls(image_ranks, ranks[0][1])
    assert metrics.pop("candidates") == 15 and metrics.pop("candidate_texts") == 40
    assert metrics == pytest.approx(slow_recalls(scores, owner))


def test_equal_scores_are_worth_nothing():
    ranks = retrieval.ranks(np.zeros((20, 20)), np.arange(20), np.arange(20))
    metrics = retrieval.recalls(*ranks)
    assert all(metrics[f"{way}_r10"] == 0.0 for way in ("image_to_text", "text_to_image"))


def test_the_best_of_an_images_texts_counts():
    scores = np.array([[0.1, 0.9, 0.5], [0.2, 0.3, 0.4]], np.float32)
    metrics = retrieval.recalls(*retrieval.ranks(scores, np.arange(2), np.array([0, 0, 1])))
    assert metrics["image_to_text_r1"] == 1.0  # image 0 is found by its second text
    assert metrics["text_to_image_r1"] == pytest.approx(1 / 3)  # only text 1 finds its image


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("k", [1, 3, 5, 100])
def test_reranking_equals_the_published_one(k, processes):
    rng = np.random.default_rng(k)
    images, texts = 9, 14
    owner = make_owner(rng, images, texts)
    itc = rng.choice(rng.random(30), size=(images, texts)).astype(np.float32)  # with ties
    logits = rng.normal(size=itc.shape).astype(np.float32) * 0.3  # neither outweighs the other
    parts = [np.arange(images)[i::processes] for i in range(processes)]
    pairs = shared(lambda s, numbers, g: retrieval.candidates(s, numbers, k, g), parts, itc)
    image = np.concatenate([part[index] for part, (index, _) in zip(parts, pairs, strict=True)])
    text = np.concatenate([text for _, text in pairs])
    assert len(set(zip(image.tolist(), text.tolist(), strict=True))) == len(image)  # each once

    i2t, t2i = slow_rerank(itc, logits, k)
    wanted = np.nonzero((i2t > -100) | (t2i.T > -100))
    assert set(zip(*map(np.ndarray.tolist, wanted), strict=True)) == set(
        zip(image.tolist(), text.tolist(), strict=True)
    )
    scores = itc[image, text], logits[image, text]
    metrics = retrieval.recalls(*retrieval.reranked(image, text, *scores, owner, images, k))
    expected = slow_recalls(i2t, owner, t2i)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("owner", "message"),
    [
        ([0, 2], "below 2"),
        ([], "one a text"),
        ([[0, 1]], "one a text"),
        ([0, 0], r"1 images have no text \(1\)"),
    ],
)
def test_texts_that_belong_nowhere_are_named(owner, message):
    with pytest.raises(ValueError, match=message):
        retrieval.check_owner(np.array(owner, int), 2)


def test_bad_scores_are_named():
    numbers = np.arange(2)
    with pytest.raises(ValueError, match="1 entries that are NaN"):
        retrieval.ranks(np.array([[np.nan, 1.0], [0, 0]]), numbers, numbers)
    with pytest.raises(ValueError, match="non-empty matrix"):
        retrieval.candidates(np.zeros((2, 0)), numbers, 2)
    with pytest.raises(ValueError, match="k must be at least 1"):
        retrieval.candidates(np.eye(2), numbers, 0)
    with pytest.raises(ValueError, match="logits are NaN"):
        retrieval.reranked(numbers, numbers, np.ones(2), np.full(2, np.nan), numbers, 2, 1)
