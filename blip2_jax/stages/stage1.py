"""Stage 1: vision-language representation learning (paper, section 3.2).

Three objectives over one batch of image-text pairs, all of weight 1: image-text contrast (ITC),
matching (ITM) and image-grounded text generation (ITG). A recipe may leave some out. The image is
encoded once; its cross-attention keys and values are made once and shared by the pass that ITC and
ITG read and the two that ITM makes of it. The hard negative of a text may be an image on another
device: then its features come here (`runtime/exchange.py`), before `ln_vision`.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from blip2_jax.models.blip2 import Blip2Stage1
from blip2_jax.models.layers import KeysValues, split_key
from blip2_jax.runtime import exchange
from blip2_jax.runtime import mesh as meshes
from blip2_jax.stages import losses
from blip2_jax.stages.step import Batch, Metrics, Params, Spec, State, update

OBJECTIVES = ("itc", "itm", "itg")


def loss_fn(
    params: Params, frozen: Params, batch: Batch, key: jax.Array | None, *, spec: Spec
) -> tuple[jax.Array, Metrics]:
    """The sum of the losses, and what to log of them.

    Args:
      params: trainable part; frozen: the rest.
      batch: `image` uint8[B, H, W, 3]; the text from [CLS] to [SEP], `text_ids` and `text_mask`
        int32[B, T]; and `image_id` int32[B]: pairs with the same image are no negatives, unless
        `spec.stage.use_image_ids` is False.
      key: randomness of dropout and of the negatives; None: no dropout, fixed negatives.
      spec: what the recipe decides (`spec.stage`: `objectives`, `label_smoothing`,
        `itc_gather_grad` and `use_image_ids`). ITM without ITC still draws its negatives by ITC's
        similarities.
    """
    model: Blip2Stage1 = spec.merge(params, frozen)
    options = spec.stage
    ids, mask = batch["text_ids"], batch["text_mask"]
    k_image, k_text, k_itm, k_itg, k_negatives = split_key(key, 5)
    same = jnp.eye(len(ids), dtype=bool)
    if options.use_image_ids:
        same = batch["image_id"][:, None] == batch["image_id"][None, :]

    k_vit = None if key is None else jax.random.fold_in(key, 1)
    features = model.image_features(batch["image"], k_vit)
    image_kv = _keys_values(model, features)
    queries, past = model.query_image(image_kv, k_image)
    # Every device compares its own images with all texts, which are small; images stay.
    texts = jax.lax.with_sharding_constraint(
        model.embed_text(ids, mask, k_text), meshes.replicated(spec.mesh)
    )
    itc, image_to_text, text_to_image = losses.itc_loss(
        model.project_image(queries),
        texts,
        model.temp[...],
        same,
        label_smoothing=options.label_smoothing,
        gather_grad=options.itc_gather_grad,
    )
    parts: Metrics = {"itc": itc}
    metrics: Metrics = {"itc/temperature": model.temp[...]}
    if "itm" in options.objectives:
        k1, k2 = jax.random.split(jax.random.key(0) if k_negatives is None else k_negatives)
        hard_image = losses.hard_negatives(k1, jax.lax.stop_gradient(text_to_image), same)
        hard_text = losses.hard_negatives(k2, jax.lax.stop_gradient(image_to_text), same)
        if meshes.num_batch_shards(spec.mesh) == 1:
            hard_kv = jax.tree.map(lambda x: x[:, hard_image], image_kv)
        else:
            hard_kv = _keys_values(model, exchange.take_rows(features, hard_image, spec.mesh))
        parts["itm"], metrics["itm/accuracy"] = _itm(
            model, image_kv, hard_kv, hard_text, ids, mask, k_itm
        )
    if "itg" in options.objectives:
        parts["itg"], metrics["itg/perplexity"] = _itg(model, past, ids, mask, options, k_itg)

    loss = functools.reduce(operator.add, (parts[name] for name in options.objectives))
    diagonal = jnp.arange(len(ids))
    of_image, of_text = (
        same[diagonal, scores.argmax(axis=1)].mean(dtype=jnp.float32)
        for scores in (image_to_text, text_to_image)
    )
    metrics["itc/accuracy"] = 0.5 * (of_image + of_text)
    return loss, {"loss": loss, **metrics, **{f"{name}/loss": x for name, x in parts.items()}}


def _keys_values(model: Blip2Stage1, features: jax.Array) -> KeysValues:
    """What the cross-attentions read of images."""
    return model.qformer.image_keys_values(model.ln_vision(features))


def _itm(
    model: Blip2Stage1,
    image_kv: KeysValues,
    hard_kv: KeysValues,
    hard_text: jax.Array,
    ids: jax.Array,
    mask: jax.Array,
    key: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Matching, with a hard negative image for each text and a hard negative text for each image.

    Three rows for each pair, next to each other so that none travels: (text, its image), which
    match, (text, hard image) and (hard text, image).

    Returns:
      The loss, and the share of rows that are judged right.
    """

    def three(*rows: jax.Array, axis: int = 0) -> jax.Array:
        x = jnp.stack(rows, axis=axis + 1)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    three_kv = jax.tree.map(lambda x, hard: three(x, hard, x, axis=1), image_kv, hard_kv)
    three_ids = three(ids, ids, ids[hard_text])
    three_mask = three(mask, mask, mask[hard_text])
    logits = model.match(three_kv, three_ids, three_mask, key)
    labels = (jnp.arange(len(logits)) % 3 == 0).astype(jnp.int32)
    accuracy = (logits.argmax(axis=-1) == labels).mean(dtype=jnp.float32)
    return losses.cross_entropy(logits, labels).mean(), accuracy


def _itg(
    model: Blip2Stage1,
    past: KeysValues,
    ids: jax.Array,
    mask: jax.Array,
    options: FrozenConfigDict,
    key: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Generation: the text from [DEC] to [SEP], with nothing to look at but the queries.

    Returns:
      The loss, and the perplexity of the text (of the loss without label smoothing).
    """
    ids = ids.at[:, 0].set(model.config.qformer.bos_token_id)
    logits = model.generate_logits(past, ids, mask, key)[:, :-1]
    targets, weights = losses.shift_labels(ids, mask)
    smoothed = losses.cross_entropy(logits, targets, label_smoothing=options.label_smoothing)
    plain = losses.weighted_mean(losses.cross_entropy(logits, targets), weights)
    return losses.weighted_mean(smoothed, weights), jnp.exp(plain)


def train_step(
    state: State, frozen: Params, batch: Batch, key: jax.Array, *, spec: Spec
) -> tuple[State, Metrics]:
    """One update of stage 1. Pure; jit it with `state` donated."""
    return update(loss_fn, state, frozen, batch, key, spec=spec)


def eval_step(params: Params, frozen: Params, batch: Batch, *, spec: Spec) -> Metrics:
    """The same losses without dropout, with fixed negatives."""
    return loss_fn(params, frozen, batch, None, spec=spec)[1]
