"""Stage 2: vision-to-language generative learning through a frozen LLM (paper, section 3.3).

The queries' outputs, projected to the LLM's width, stand before the caption as soft prompts; the
loss is the LLM's language-modeling loss of the caption and its end token. Gradients flow through
the frozen LLM to the Q-Former; no gradient of the LLM's own weights is ever formed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from blip2_jax.data.batch_spec import llm_lengths
from blip2_jax.models import lora
from blip2_jax.models.blip2 import Blip2Config, Blip2Stage2
from blip2_jax.stages import flops, losses
from blip2_jax.stages.step import WEIGHT, Batch, Metrics, Params, Spec

TOWER = ""


def make_module(
    config: ConfigDict, sizes: Blip2Config, *, dtype: Any, rngs: nnx.Rngs
) -> nnx.Module:
    """See `stages.Stage`."""
    model = Blip2Stage2(sizes, dtype=dtype, rngs=rngs)
    if config.model.llm.lora.rank:
        lora.add(model, **config.model.llm.lora, rngs=rngs)
    return model


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
    if model.language_config.is_encoder_decoder:
        real = learned.astype(mask.dtype)
        logits = model.language_logits(prompt, targets, real, k_llm, prefix=(ids, mask))
    else:
        logits = model.language_logits(prompt, ids, mask, k_llm)
    loss = losses.weighted_mean(losses.cross_entropy(logits, targets), learned)
    accuracy = losses.weighted_mean(logits.argmax(axis=-1) == targets, learned)
    metrics = {
        "loss": loss,
        "lm/loss": loss,
        "lm/perplexity": jnp.exp(loss),
        "lm/token_accuracy": accuracy,
        WEIGHT: learned.sum(dtype=jnp.float32),
    }
    return loss, metrics


def flops_per_sample(config: ConfigDict, sizes: Blip2Config) -> dict[str, flops.Flops]:
    """One pass of the Q-Former, and the LLM on its output and the text."""
    if sizes.llm is None:
        raise ValueError("A stage-2 model has a language model; Blip2Config.llm is None.")
    c, trained = sizes.qformer, config.trainable
    read, learned = llm_lengths(config, encoder_decoder=sizes.llm.is_encoder_decoder)
    queries = c.num_query_tokens
    text = config.data.text_length if sizes.qformer_reads_prompt else 0
    qformer = flops.qformer(c, queries, text, sizes.vit.num_tokens)
    qformer += flops.image_keys_values(c, sizes.vit)
    projection = flops.linear(queries, c.hidden_size, sizes.llm.hidden_size)
    if sizes.llm.is_encoder_decoder:
        llm = flops.encoder_decoder(sizes.llm, queries + read, learned)
    else:
        llm = flops.decoder(sizes.llm, queries + read, learned)
    return {
        "vit": flops.vit(sizes.vit).flops(trained="vit" in trained, inputs=False),
        "qformer": qformer.flops(trained="qformer" in trained),
        "language_projection": projection.flops(trained="language_projection" in trained),
        "llm": llm.flops(trained="llm" in trained),
    }
