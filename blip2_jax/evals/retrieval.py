"""Image-text retrieval: recall at k both ways, and re-ranking by image-text matching (ITM).

BLIP-2's published protocol (section 4.4 and its released code): the contrastive similarity (ITC)
of all pairs picks k candidates per query, ITM reads each candidate pair jointly, and the final
score is ITM logit + ITC cosine; pairs that are no candidates score -100.
"""

from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from blip2_jax.evals import _few

RANKS = (1, 5, 10)
NOT_A_CANDIDATE = -100.0
K_COCO = 128  # candidates per query, as published for COCO and Flickr30K

ItmFn = Callable[[np.ndarray, np.ndarray], np.ndarray]


def recall_metrics(
    scores_i2t: np.ndarray, text_to_image: np.ndarray, *, scores_t2i: np.ndarray | None = None
) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways.

    An image may have several texts: from image to text, the best ranked of them counts. Ties
    count against the model: a wrong candidate with the same score stands in front.

    Args:
      scores_i2t: float[N_img, N_txt], higher is more alike; each image ranks the texts in its row.
      text_to_image: int[N_txt], the image that each text belongs to.
      scores_t2i: float[N_txt, N_img], each text ranks the images in its row; by default the
        transpose of `scores_i2t`. `rerank` gives both.

    Returns:
      {"image_to_text_r1", "..._r5", "..._r10", "text_to_image_r1", ...: 0..1,
      "candidates": N_img, "candidate_texts": N_txt}.

    Raises:
      ValueError: shapes that do not fit, scores that are not numbers, an image without a text.
    """
    scores_i2t, owner = np.asarray(scores_i2t), np.asarray(text_to_image)
    images, texts = _check(scores_i2t, "scores_i2t")
    if owner.shape != (texts,) or owner.min() < 0 or owner.max() >= images:
        values = _few(owner.ravel().tolist())
        raise ValueError(
            f"text_to_image must be int[{texts}] with values from 0 and below {images} for scores "
            f"of shape {scores_i2t.shape}; got shape {owner.shape}, values {values}."
        )
    without = sorted(set(range(images)) - set(owner.tolist()))
    if without:
        raise ValueError(f"{len(without)} images have no text ({_few(without)}): leave them out.")
    scores_t2i = scores_i2t.T if scores_t2i is None else np.asarray(scores_t2i)
    if _check(scores_t2i, "scores_t2i") != (texts, images):
        raise ValueError(f"scores_t2i is {scores_t2i.shape}, expected {(texts, images)}.")

    ranks = {
        "image_to_text": np.array([_rank(scores_i2t[i], owner == i) for i in range(images)]),
        "text_to_image": np.array(
            [_rank(scores_t2i[t], np.arange(images) == owner[t]) for t in range(texts)]
        ),
    }
    recalls = {
        f"{way}_r{k}": float(np.mean(rank < k)) for way, rank in ranks.items() for k in RANKS
    }
    return recalls | {"candidates": images, "candidate_texts": texts}


def _rank(scores: np.ndarray, right: np.ndarray) -> int:
    """How many wrong candidates score at least as high as the best right one."""
    return int(np.count_nonzero(scores[~right] >= scores[right].max()))


def _check(scores: np.ndarray, name: str) -> tuple[int, int]:
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"{name} must be a non-empty matrix, got shape {scores.shape}.")
    if np.isnan(scores).any():
        raise ValueError(f"{name} has {int(np.isnan(scores).sum())} entries that are NaN.")
    return scores.shape


def rerank(
    itc: np.ndarray,
    itm_fn: ItmFn,
    k: int = K_COCO,
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of both directions after ITM has read each query's `k` best candidates.

    A pair that is a candidate in both directions is read once.

    Args:
      itc: float[N_img, N_txt], cosine of each pair, the maximum over the queries.
      itm_fn: (image_idx int32[b], text_idx int32[b]) -> float[b], the ITM logit of class
        "match", mean over the queries. `b` is always `batch_size` (the last batch is padded with
        pair (0, 0)), so that it compiles once. Pairs come sorted by image.
      k: candidates per query; more than there are means all.
      batch_size: pairs per call.
      progress: shows a progress bar.

    Returns:
      (scores_i2t float32[N_img, N_txt], scores_t2i float32[N_txt, N_img]), for `recall_metrics`.
    """
    itc = np.asarray(itc, np.float32)
    _check(itc, "itc")
    if k < 1 or batch_size < 1:
        raise ValueError(f"k and batch_size must be at least 1, got k={k}, {batch_size=}.")
    per_image, per_text = _top(itc, k), _top(itc.T, k).T  # bool[N_img, N_txt]
    image_idx, text_idx = np.nonzero(per_image | per_text)
    logits = _batched(itm_fn, image_idx, text_idx, batch_size, progress)
    final = np.full(itc.shape, NOT_A_CANDIDATE, np.float32)
    final[image_idx, text_idx] = logits + itc[image_idx, text_idx]
    scores_i2t = np.where(per_image, final, np.float32(NOT_A_CANDIDATE))
    scores_t2i = np.where(per_text, final, np.float32(NOT_A_CANDIDATE)).T
    return scores_i2t, scores_t2i


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    """bool, true at each row's `k` highest; among equals the first ones."""
    chosen = np.zeros(scores.shape, bool)
    for row, marks in zip(scores, chosen, strict=True):
        marks[np.argsort(-row, kind="stable")[:k]] = True
    return chosen


def _batched(
    itm_fn: ItmFn, image_idx: np.ndarray, text_idx: np.ndarray, batch_size: int, progress: bool
) -> np.ndarray:
    pairs = len(image_idx)
    padding = (0, -pairs % batch_size)
    image_idx = np.pad(image_idx, padding).astype(np.int32)
    text_idx = np.pad(text_idx, padding).astype(np.int32)
    logits = np.empty(len(image_idx), np.float32)
    with tqdm(total=pairs, desc="ITM re-ranking", unit="pair", disable=not progress) as bar:
        for start in range(0, pairs, batch_size):
            batch = slice(start, start + batch_size)
            found = np.asarray(itm_fn(image_idx[batch], text_idx[batch]), np.float32)
            if found.shape != (batch_size,):
                raise ValueError(f"itm_fn gave shape {found.shape}, expected ({batch_size},).")
            logits[batch] = found
            bar.update(min(batch_size, pairs - start))
    if np.isnan(logits[:pairs]).any():
        raise ValueError("itm_fn gave logits that are NaN: check the model's weights and dtype.")
    return logits[:pairs]
