"""Pre-training of the embedded world's language model, on text alone.

It is next-token prediction with a weight for each token: low for what cannot be predicted (the
description of a new scene), high for what follows from the text before it (an answer).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from blip2_jax.models.opt import OPT, OPTConfig
from blip2_jax.stages import flops, losses
from blip2_jax.stages.step import Batch, Metrics, Params, Spec

TOWER = "llm"


class OPTOnly(nnx.Module):
    """An OPT without the rest of a BLIP-2, under the name that it has inside one."""

    def __init__(self, config: OPTConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        self.llm = OPT(config, dtype=dtype, rngs=rngs)


def make_module(config: ConfigDict, sizes: OPTConfig, *, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    """See `stages.Stage`."""
    del config
    return OPTOnly(sizes, dtype=dtype, rngs=rngs)


def loss_fn(
    params: Params, frozen: Params, batch: Batch, key: jax.Array | None, *, spec: Spec
) -> tuple[jax.Array, Metrics]:
    """Weighted next-token loss.

    Args:
      params: `llm`, the language model; frozen: nothing.
      batch: `llm_ids`, `llm_mask` int32[B, S]; `llm_weights` float32[B, S], the weight of each
        token as a target (answers weigh 1).
      key: randomness of dropout, or None.
      spec: what the recipe decides.
    """
    model: OPTOnly = spec.merge(params, frozen)
    llm = model.llm
    ids, weights = batch["llm_ids"], batch["llm_weights"][:, 1:]
    hidden = llm(llm.embed(ids), batch["llm_mask"], key=key)
    logits = llm.logits(hidden[:, :-1])
    targets, real = losses.shift_labels(ids, batch["llm_mask"])
    entropy = losses.cross_entropy(logits, targets)
    loss = losses.weighted_mean(entropy, weights * real)
    hits = logits.argmax(axis=-1) == targets
    metrics = {
        "loss": loss,
        "lm/perplexity": jnp.exp(losses.weighted_mean(entropy, real)),
        "lm/answer_accuracy": _answer_accuracy(hits, (weights == 1.0) & (real > 0)),
    }
    return loss, metrics


def _answer_accuracy(hits: jax.Array, answers: jax.Array) -> jax.Array:
    """Share of answers all of whose tokens are hit; an answer is a run of true in `answers`.

    Args:
      hits: bool[B, S], whether the likeliest token is the target.
      answers: bool[B, S], whether the target belongs to an answer.
    """
    starts = answers & ~jnp.pad(answers, ((0, 0), (1, 0)))[:, :-1]
    count = functools.partial(jax.ops.segment_sum, num_segments=answers.shape[1] + 1)
    misses = jax.vmap(count)((answers & ~hits).astype(jnp.int32), starts.cumsum(axis=1))
    return 1 - (misses > 0).sum() / jnp.maximum(starts.sum(), 1)


def flops_per_sample(config: ConfigDict, sizes: OPTConfig) -> dict[str, flops.Flops]:
    """The whole language model; the last token is not scored."""
    length = config.data.llm_length
    return {"llm": flops.decoder(sizes, length, length - 1).flops(trained=True)}
