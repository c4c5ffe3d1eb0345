"""Stage 1: vision-language representation learning (paper, section 3.2).

Three objectives over one batch of image-text pairs, all of weight 1: image-text contrast (ITC),
matching (ITM) and image-grounded text generation (ITG). A recipe may leave some out. The image is
encoded once; its cross-attention keys and values are made once and shared by the pass that ITC and
ITG read and the two that ITM makes of it. The hard negative of a text may be an image on another
device: then that device sends its features (`runtime/exchange.py`), before `ln_vision`.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict, FrozenConfigDict

from blip2_jax.models.attention import KeysValues
from blip2_jax.models.blip2 import Blip2Config, Blip2Stage1
from blip2_jax.models.layers import split_key
from blip2_jax.runtime import exchange
from blip2_jax.runtime import mesh as meshes
from blip2_jax.stages import flops, losses
from blip2_jax.stages.step import Batch, Metrics, Params, Spec

TOWER = ""
OBJECTIVES = ("itc", "itm", "itg")


def make_module(
    config: ConfigDict, sizes: Blip2Config, *, dtype: Any, rngs: nnx.Rngs
) -> nnx.Module:
    """See `stages.Stage`."""
    del config
    return Blip2Stage1(sizes, dtype=dtype, rngs=rngs)


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
    """Keys and values of images for all cross-attentions."""
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

    Three examples for each pair, next to each other so that each stays on its device: (text, its
    image), which match, (text, hard image) and (hard text, image).

    Returns:
      The loss, and the share of examples that are classified right.
    """

    def interleave(*arrays: jax.Array, axis: int = 0) -> jax.Array:
        x = jnp.stack(arrays, axis=axis + 1)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    all_kv = jax.tree.map(lambda x, hard: interleave(x, hard, x, axis=1), image_kv, hard_kv)
    all_ids = interleave(ids, ids, ids[hard_text])
    all_masks = interleave(mask, mask, mask[hard_text])
    logits = model.match(all_kv, all_ids, all_masks, key)
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
    """Generation: the text from [DEC] to [SEP]; of the image it attends to the queries alone.

    Returns:
      The loss, and the perplexity of the text (of the loss without label smoothing).
    """
    ids = ids.at[:, 0].set(model.config.qformer.bos_token_id)
    logits = model.generate_logits(past, ids, mask, key)[:, :-1]
    targets, weights = losses.shift_labels(ids, mask)
    smoothed = losses.cross_entropy(logits, targets, label_smoothing=options.label_smoothing)
    plain = losses.weighted_mean(losses.cross_entropy(logits, targets), weights)
    return losses.weighted_mean(smoothed, weights), jnp.exp(plain)


def flops_per_sample(config: ConfigDict, sizes: Blip2Config) -> dict[str, flops.Flops]:
    """Passes of the Q-Former: queries (ITC), text (ITC), three pairs (ITM), text (ITG).

    Keys and values are made of two images a sample, its own and its hard negative, whose features
    another device may have sent.
    """
    c, text, trained = sizes.qformer, config.data.text_length, config.trainable
    queries, width, image_tokens = c.num_query_tokens, c.hidden_size, sizes.vit.num_tokens
    qformer = flops.image_keys_values(c, sizes.vit)
    qformer += flops.qformer(c, queries, 0, image_tokens) + flops.qformer(c, 0, text, 0)
    if "itm" in config.stage.objectives:
        qformer += flops.image_keys_values(c, sizes.vit)
        qformer += flops.qformer(c, queries, text, image_tokens) * 3
    if "itg" in config.stage.objectives:
        qformer += flops.qformer(c, 0, text, 0, past=queries)
    similarity = flops.Work(scores=2.0 * config.data.batch_size * queries * sizes.projection_dim)
    projections = flops.linear(queries + 1, width, sizes.projection_dim)
    itm, itg = flops.linear(3 * queries, width, 2), flops.linear(text, width, width, c.vocab_size)
    heads = {
        "itc": (projections + similarity).flops(trained=True),
        "itm": itm.flops(trained="itm_head" in trained),
        "itg": itg.flops(trained="itg_head" in trained),
    }
    return {
        "vit": flops.vit(sizes.vit).flops(trained="vit" in trained, inputs=False),
        "qformer": qformer.flops(trained="qformer" in trained),
        **{name: head for name, head in heads.items() if name in config.stage.objectives},
    }
