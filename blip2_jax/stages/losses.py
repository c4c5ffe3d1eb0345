"""The losses of both stages, over the global batch, in float32.

Nothing here knows how many devices hold the batch: the arrays are global, and XLA inserts what
communication that takes.
"""

import jax
import jax.numpy as jnp


def cross_entropy(
    logits: jax.Array, targets: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """Cross-entropy of each row: float32[..., C] and int32[...] -> float32[...].

    Smoothing spreads its mass over all C classes, the right one included, as torch does.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    picked = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return -(1.0 - label_smoothing) * picked - label_smoothing * log_p.mean(axis=-1)


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy against distributions: float32[..., C] twice -> float32[...]."""
    return -(targets * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(axis=-1)


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean of `values` under `weights`; 0 where all weights are 0."""
    weights = weights.astype(jnp.float32)
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1e-9)


def similarity(image: jax.Array, text: jax.Array) -> jax.Array:
    """ITC's similarity: the best of an image's queries against the text.

    Args:
      image: float32[B, Q, P], of unit length.
      text: float32[C, P], of unit length.

    Returns:
      float32[B, C], cosines.
    """
    return jnp.einsum("bqp,cp->bcq", image, text).max(axis=-1)


def itc_targets(same: jax.Array, label_smoothing: float) -> jax.Array:
    """Target distribution of each row of the similarity matrix.

    Args:
      same: bool[B, B], True where image b and text c belong together (the diagonal, and pairs
        that share an image).
      label_smoothing: mass spread evenly over the batch.

    Returns:
      float32[B, B], rows sum to 1 (LAVIS `blip2_qformer.py`: both of its loss paths in one).
    """
    positives = same / same.sum(axis=1, keepdims=True)
    return (1.0 - label_smoothing) * positives + label_smoothing / same.shape[1]


def itc_loss(
    image: jax.Array,
    text: jax.Array,
    temperature: jax.Array,
    same: jax.Array,
    *,
    label_smoothing: float,
    gather_grad: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Image-text contrastive loss (paper, section 3.2; LAVIS for smoothing and temperature).

    Args:
      image: float32[B, Q, P]; text: float32[B, P]; both of unit length.
      temperature: divides the cosines.
      same: see `itc_targets`.
      label_smoothing: 0.1 in LAVIS.
      gather_grad: True gives each direction its gradient through both sides. False gives it
        through the row side only, which is what LAVIS computes on several devices, where the
        gathered features carry no gradient.

    Returns:
      The loss, and the scaled similarities float32[B, B] image to text and text to image.
    """
    other = (lambda x: x) if gather_grad else jax.lax.stop_gradient
    image_to_text = similarity(image, other(text)) / temperature
    text_to_image = similarity(other(image), text).T / temperature
    targets = itc_targets(same, label_smoothing)
    loss = 0.5 * (
        soft_cross_entropy(image_to_text, targets).mean()
        + soft_cross_entropy(text_to_image, targets).mean()
    )
    return loss, image_to_text, text_to_image


def hard_negatives(key: jax.Array, similarities: jax.Array, same: jax.Array) -> jax.Array:
    """Draws one negative a row, the likelier the more similar: int32[B].

    LAVIS: softmax over the batch of the scaled similarities with the positives masked by -10000.
    """
    return jax.random.categorical(key, jnp.where(same, -10000.0, similarities), axis=-1)


def shift_labels(ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Next-token targets of logits[:, :-1], and their weights: int32[B, T - 1] twice."""
    return ids[:, 1:], mask[:, 1:]
