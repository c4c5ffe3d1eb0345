"""Stage 2: vision-to-language generative learning through a frozen LLM (paper, section 3.3).

The queries' outputs, projected to the LLM's width, stand before the caption as soft prompts; the
loss is the LLM's language-modeling loss of the caption and its end token. Gradients flow through
the frozen LLM to the Q-Former; no gradient of the LLM's own weights is ever formed.
"""

import jax
import jax.numpy as jnp

from blip2_jax.models.blip2 import Blip2Stage2
from blip2_jax.models.t5 import T5Config
from blip2_jax.stages import losses
from blip2_jax.stages.step import WEIGHT, Batch, Metrics, Params, Spec, State, update


def loss_fn(
    params: Params, frozen: Params, batch: Batch, key: jax.Array | None, *, spec: Spec
) -> tuple[jax.Array, Metrics]:
    """Language-modeling loss of the caption.

    Args:
      params: trainable part; frozen: the rest.
      batch: `image` uint8[B, H, W, 3]; and of a decoder-only LLM, `llm_ids` and `llm_mask`
        int32[B, S] and `llm_labels` int32[B, S], the ids themselves with -100 where nothing is to
        be learned (padding, and a prompt). With no prompt the begin token is a label too, as in
        LAVIS. Of an encoder-decoder, ids and mask are what its encoder reads after the image (the
        first part of the caption, drawn anew each time, or a prompt), and labels its decoder's
        text. Where the Q-Former reads the prompt too, `text_ids` and `text_mask` int32[B, T].
      key: randomness of dropout, or None.
      spec: what the recipe decides.
    """
    model: Blip2Stage2 = spec.merge(params, frozen)
    k_queries, k_llm = (None, None) if key is None else jax.random.split(key)
    ids, mask = batch["llm_ids"], batch["llm_mask"]
    reads_prompt = model.config.qformer_reads_prompt
    text = (batch["text_ids"], batch["text_mask"]) if reads_prompt else None
    prompt = model.visual_prompt(batch["image"], text, key=k_queries)
    learned = batch["llm_labels"] >= 0
    targets = jnp.where(learned, batch["llm_labels"], 0)
    if isinstance(model.config.llm, T5Config):
        real = learned.astype(mask.dtype)
        logits = model.language_logits(prompt, targets, real, k_llm, prefix=(ids, mask))
    else:
        logits = model.language_logits(prompt, ids, mask, k_llm)
    loss = losses.weighted_mean(losses.cross_entropy(logits, targets), learned)
    hits = losses.weighted_mean(logits.argmax(axis=-1) == targets, learned)
    metrics = {
        "loss": loss,
        "lm/loss": loss,
        "lm/perplexity": jnp.exp(loss),
        "lm/token_accuracy": hits,
        WEIGHT: learned.sum(dtype=jnp.float32),
    }
    return loss, metrics


def train_step(
    state: State, frozen: Params, batch: Batch, key: jax.Array, *, spec: Spec
) -> tuple[State, Metrics]:
    """One update of stage 2. Pure; jit it with `state` donated."""
    return update(loss_fn, state, frozen, batch, key, spec=spec)


def eval_step(params: Params, frozen: Params, batch: Batch, *, spec: Spec) -> Metrics:
    """The same loss without dropout."""
    return loss_fn(params, frozen, batch, None, spec=spec)[1]
