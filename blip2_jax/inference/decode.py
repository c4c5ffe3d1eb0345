"""Decoding with a KV cache: static shapes, one compiled loop."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class _Loop(NamedTuple):
    step: jax.Array  # int32[], tokens written so far
    done: jax.Array  # bool[B]
    tokens: jax.Array  # int32[B, max_new_tokens]
    logits: jax.Array  # float32[B, V], of the next token
    cache: tuple[jax.Array, jax.Array]


def greedy(
    llm: nnx.Module,
    embeds: jax.Array,
    mask: jax.Array,
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
) -> jax.Array:
    """Continues prompts with the likeliest token each time, until `eos_id`.

    Args:
      llm: a decoder-only language model (`models.opt.OPT`).
      embeds: float[B, P, D], the prompts: soft prompts, embedded text, or both.
      mask: int32[B, P], 0 at padding, which may stand anywhere but at the end of a prompt.
      max_new_tokens: length of the result.
      eos_id: token that ends a text; it is not part of the result.
      pad_id: what stands after the end.

    Returns:
      int32[B, max_new_tokens].
    """
    batch, length = mask.shape
    full_mask = jnp.pad(mask, ((0, 0), (0, max_new_tokens)), constant_values=1)
    cache = llm.init_cache(batch, length + max_new_tokens)
    hidden, cache = llm(embeds, full_mask, cache=cache)

    def more(loop: _Loop):
        return (loop.step < max_new_tokens) & ~loop.done.all()

    def advance(loop: _Loop) -> _Loop:
        token = jnp.argmax(loop.logits, axis=-1)
        done = loop.done | (token == eos_id)
        token = jnp.where(done, pad_id, token)
        hidden, cache = llm(
            llm.embed(token[:, None]), full_mask, cache=loop.cache, offset=length + loop.step
        )
        tokens = jax.lax.dynamic_update_slice_in_dim(loop.tokens, token[:, None], loop.step, axis=1)
        return _Loop(loop.step + 1, done, tokens, llm.logits(hidden)[:, 0], cache)

    start = _Loop(
        step=jnp.int32(0),
        done=jnp.zeros(batch, bool),
        tokens=jnp.full((batch, max_new_tokens), pad_id, jnp.int32),
        logits=llm.logits(hidden[:, -1:])[:, 0],
        cache=cache,
    )
    return jax.lax.while_loop(more, advance, start).tokens
