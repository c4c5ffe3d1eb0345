"""Image-text retrieval: recall at k both ways, and re-ranking by image-text matching (ITM).

BLIP-2's published protocol (section 4.4 and its released code): the contrastive similarity (ITC)
of all pairs picks k candidates per query, ITM reads each candidate pair jointly, and the final
score is ITM logit + ITC cosine; all pairs that are no candidates share the last place.

The images may be divided over processes: each passes the scores of its own images, and a `gather`
that stacks an array of all processes. A rank is the number of wrong candidates whose score is at
least that of the right one: ties count against the model.
"""

from collections.abc import Callable

import numpy as np

from blip2_jax.evals.metrics import first_few

RANKS = (1, 5, 10)

Gather = Callable[[np.ndarray], np.ndarray]  # x of each process -> [processes, *x.shape]


def alone(x: np.ndarray) -> np.ndarray:
    """The `Gather` of a single process."""
    return x[None]


def recalls(image_ranks: np.ndarray, text_ranks: np.ndarray) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways, from ranks.

    Returns:
      {"image_to_text_r1", "..._r5", "..._r10", "text_to_image_r1", ...: 0..1,
      "candidates": number of images, "candidate_texts": number of texts}.
    """
    ways = {"image_to_text": image_ranks, "text_to_image": text_ranks}
    scores = {f"{way}_r{k}": float(np.mean(rank < k)) for way, rank in ways.items() for k in RANKS}
    return scores | {"candidates": len(image_ranks), "candidate_texts": len(text_ranks)}


def check_owner(owner: np.ndarray, images: int) -> np.ndarray:
    """Holds that every text belongs to an image and every image has a text.

    Args:
      owner: int[M], the image that each text belongs to.
      images: number of images, N.

    Raises:
      ValueError: a number out of range, or images without a text.
    """
    owner = np.asarray(owner)
    if owner.ndim != 1 or not len(owner) or owner.min() < 0 or owner.max() >= images:
        raise ValueError(
            f"The owners of texts must be numbers from 0 and below {images}, one a text; got "
            f"shape {owner.shape}, values {first_few(owner.ravel().tolist())}."
        )
    without = sorted(set(range(images)) - set(owner.tolist()))
    if without:
        raise ValueError(
            f"{len(without)} images have no text ({first_few(without)}): leave them out."
        )
    return owner


def ranks(
    scores: np.ndarray, image_numbers: np.ndarray, owner: np.ndarray, gather: Gather = alone
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks both ways of all pairs' scores; an image's best ranked text counts.

    Args:
      scores: float[n, M], of this process's images with all texts; higher is more alike.
      image_numbers: int[n], of these images.
      owner: int[M], the image that each text belongs to.
      gather: see the module's text.

    Returns:
      int[n], of these images; int[M], of all texts.
    """
    _check(scores, "scores")
    by_image = list(zip(scores, image_numbers, strict=True))
    image_ranks = np.array([_rank(s, owner == image) for s, image in by_image])
    # What each text scores with its own image, which one of the processes holds.
    own = np.full(len(owner), -np.inf, np.float32)
    for s, image in by_image:
        own[owner == image] = s[owner == image]
    own = gather(own).max(axis=0)
    wrong = np.zeros(len(owner), np.int64)
    for s, image in by_image:
        wrong += (s >= own) & (owner != image)
    return image_ranks.astype(np.int64), gather(wrong).sum(axis=0)


def _rank(scores: np.ndarray, right: np.ndarray) -> int:
    """How many wrong candidates score at least as high as the best right one."""
    return int(np.count_nonzero(scores[~right] >= scores[right].max()))


def _check(scores: np.ndarray, name: str) -> None:
    if scores.ndim != 2 or not scores.shape[1]:
        raise ValueError(f"{name} must be a non-empty matrix, got shape {scores.shape}.")
    if np.isnan(scores).any():
        raise ValueError(f"{name} has {int(np.isnan(scores).sum())} entries that are NaN.")


def candidates(
    itc: np.ndarray, image_numbers: np.ndarray, k: int, gather: Gather = alone
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs that ITM is to read: candidates of an image, of a text, or of both; each once.

    Args:
      itc: float[n, M], cosines of this process's images with all texts.
      image_numbers: int[n], of these images, ascending.
      k: candidates per query; more than there are means all. Among equals the first ones.
      gather: see the module's text.

    Returns:
      Index into `image_numbers` and number of the text, int[P] each, of the pairs of these images,
      in their order.
    """
    _check(itc, "itc")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    wanted = np.zeros(itc.shape, bool)
    for scores, marks in zip(itc, wanted, strict=True):
        marks[_best(scores, k)] = True
    # Of each text the best images here, then the best of all processes' best.
    texts, max_images = itc.shape[1], int(gather(np.array(len(image_numbers))).max())
    best = np.full((texts, min(k, max_images)), -np.inf, np.float32)
    image_of_best = np.full(best.shape, np.iinfo(np.int32).max, np.int32)
    for text in range(texts):
        index = _best(itc[:, text], k)
        best[text, : len(index)] = itc[index, text]
        image_of_best[text, : len(index)] = image_numbers[index]
    best = np.concatenate(list(gather(best)), axis=1)
    image_of_best = np.concatenate(list(gather(image_of_best)), axis=1)
    index_of = {int(image): i for i, image in enumerate(image_numbers)}
    for text in range(texts):
        for column in np.lexsort((image_of_best[text], -best[text]))[:k]:
            i = index_of.get(int(image_of_best[text, column]))
            if i is not None:
                wanted[i, text] = True
    image_index, text_index = np.nonzero(wanted)
    return image_index, text_index


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the `k` highest; among equals the first ones."""
    return np.argsort(-scores, kind="stable")[:k]


def reranked(
    image: np.ndarray,
    text: np.ndarray,
    itc: np.ndarray,
    itm: np.ndarray,
    owner: np.ndarray,
    images: int,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks both ways after ITM has read the candidates.

    Args:
      image, text: int[P], the pairs of `candidates`, of all images.
      itc: float32[P], their cosines.
      itm: float32[P], their ITM logits of class "match", mean over the queries.
      owner: int[M], the image that each text belongs to.
      images: N.
      k: as for `candidates`.

    Returns:
      int[N], of the images; int[M], of the texts. A query whose right answer is no candidate
      ranks behind all wrong ones.

    Raises:
      ValueError: an ITM logit is NaN.
    """
    if np.isnan(itm).any():
        raise ValueError("ITM logits are NaN: check the model's weights and dtype.")
    owner, texts = np.asarray(owner), len(owner)
    final = itc.astype(np.float32) + itm.astype(np.float32)
    right = owner[text] == image
    wrong_texts = texts - np.bincount(owner, minlength=images)
    image_ranks = _grouped(image, text, itc, final, right, k, wrong_texts)
    text_ranks = _grouped(text, image, itc, final, right, k, np.full(texts, images - 1))
    return image_ranks, text_ranks


def _grouped(
    query: np.ndarray,
    other: np.ndarray,
    itc: np.ndarray,
    final: np.ndarray,
    right: np.ndarray,
    k: int,
    last: np.ndarray,
) -> np.ndarray:
    """Rank of each query's best right candidate among its k best by ITC; `last` without one."""
    order = np.lexsort((other, -itc, query))
    query, final, right = query[order], final[order], right[order]
    kept = np.arange(len(query)) - np.searchsorted(query, query) < k
    query, final, right = query[kept], final[kept], right[kept]
    best = np.full(len(last), -np.inf, np.float32)
    np.maximum.at(best, query[right], final[right])
    in_front = ~right & (final >= best[query])
    counted = np.bincount(query[in_front], minlength=len(last))
    return np.where(np.isneginf(best), last, counted)
