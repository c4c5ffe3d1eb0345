"""Logits processors, and sampling: what transformers calls processors and warpers."""

import jax
import jax.numpy as jnp

from blip2_jax.inference.decode_state import DecodeState
from blip2_jax.inference.options import Decoding


def process_logits(
    logits: jax.Array, state: DecodeState, decoding: Decoding, eos_ids: tuple[int, ...]
) -> jax.Array:
    """Repetition penalty, repeated n-grams and least length, in transformers' order.

    Args:
      logits: float32[B, W, V]; in a beam search, log-probabilities.
      state: what was generated so far.
      decoding: the options.
      eos_ids: tokens that end a text.

    Returns:
      float32[B, W, V], -inf where a token must not be chosen.
    """
    if decoding.repetition_penalty != 1.0:
        penalty = decoding.repetition_penalty
        lowered = jnp.where(logits < 0, logits * penalty, logits / penalty)
        logits = jnp.where(state.seen_tokens, lowered, logits)
    if decoding.no_repeat_ngram_size:
        repeats = repeated_ngrams(state, decoding.no_repeat_ngram_size, logits.shape[-1])
        logits = jnp.where(repeats, -jnp.inf, logits)
    if decoding.min_new_tokens:
        is_eos = jnp.isin(jnp.arange(logits.shape[-1]), jnp.array(eos_ids))
        logits = jnp.where(is_eos & (state.step < decoding.min_new_tokens), -jnp.inf, logits)
    return logits


def repeated_ngrams(state: DecodeState, size: int, vocabulary: int) -> jax.Array:
    """bool[B, W, V]: tokens that would complete `size` tokens that were seen in a row before."""
    batch, width, length = state.tokens.shape

    def repeat(x: jax.Array) -> jax.Array:
        """[B, P] -> [B, W, P]."""
        return jnp.broadcast_to(x[:, None], (batch, width, x.shape[1]))

    generated = jnp.broadcast_to(jnp.arange(length) < state.step, state.tokens.shape)
    tokens = jnp.concatenate([repeat(state.prefix_ids), state.tokens], axis=-1)
    real = jnp.concatenate([repeat(state.prefix_mask > 0), generated], axis=-1)
    count_so_far = state.prefix_ids.shape[1] + state.step  # padding included
    # Padding in front, for n-grams that would begin before the first token: they repeat nothing.
    tokens, real = (jnp.pad(x, ((0, 0), (0, 0), (size - 1, 0))) for x in (tokens, real))

    def last(x: jax.Array) -> jax.Array:
        """The newest size - 1 entries."""
        return jax.lax.dynamic_slice_in_dim(x, count_so_far, size - 1, axis=-1)

    count = tokens.shape[-1] - size + 1
    matches = real[..., size - 1 :] & last(real).all(axis=-1, keepdims=True)
    for i in range(size - 1):
        window = slice(i, i + count)
        matches &= real[..., window] & (tokens[..., window] == last(tokens)[..., i, None])
    ids = jnp.where(matches, tokens[..., size - 1 :], vocabulary)
    prompts, sequences = jnp.ogrid[:batch, :width]
    banned = jnp.zeros((batch, width, vocabulary + 1), bool)
    return banned.at[prompts[..., None], sequences[..., None], ids].set(True)[..., :-1]


def warp_logits(logits: jax.Array, decoding: Decoding) -> jax.Array:
    """Temperature, then top-k, then top-p: float32[B, W, V] with -inf where never drawn."""
    logits = logits / decoding.temperature
    if decoding.top_k:
        least = jax.lax.top_k(logits, min(decoding.top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if decoding.top_p < 1.0:
        ascending = jnp.sort(logits, axis=-1)
        # From the least likely on, drop tokens until dropping more would go below the share p.
        dropped = jnp.cumsum(jax.nn.softmax(ascending), axis=-1) <= 1 - decoding.top_p
        dropped = dropped.at[..., -1].set(False)
        least = jnp.where(dropped, jnp.inf, ascending).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def sample(logits: jax.Array, request_index: jax.Array, key: jax.Array) -> jax.Array:
    """int32[B, W], drawn with a key of each prompt's own: float32[B, W, V] and int32[B]."""
    width, vocabulary = logits.shape[1:]
    noise = jax.vmap(lambda i: jax.random.gumbel(jax.random.fold_in(key, i), (width, vocabulary)))
    return (logits + noise(request_index)).argmax(axis=-1).astype(jnp.int32)
