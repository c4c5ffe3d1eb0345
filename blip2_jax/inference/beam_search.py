"""Beam search: which tokens the beams go on with, and which texts are finished.

What it keeps and when it stops is as in transformers 5, token for token.
"""

import jax
import jax.numpy as jnp

from blip2_jax.inference.decode_state import NEG_INF, DecodeState, put
from blip2_jax.inference.logits import process_logits
from blip2_jax.inference.options import Decoding


def choose_beams(
    logits: jax.Array, state: DecodeState, decoding: Decoding, eos_ids: tuple[int, ...]
) -> tuple[DecodeState, jax.Array]:
    """The next token of every beam.

    Args:
      logits: float32[B, W, V].
      state: the beams.
      decoding: the options.
      eos_ids: tokens that end a text.

    Returns:
      The new state, and which beam each new one continues, int32[B, W].
    """
    batch, width, vocabulary = logits.shape
    keep = max(2, 1 + len(eos_ids)) * width  # enough to go on if the best ones all end
    gains = process_logits(jax.nn.log_softmax(logits), state, decoding, eos_ids)
    # The best of each beam, then the best of all.
    best, ids = jax.lax.top_k(
        (gains + state.total_log_prob[..., None]).reshape(batch * width, vocabulary),
        min(keep, vocabulary),
    )
    total, order = jax.lax.top_k(best.reshape(batch, -1), keep)
    ids = jnp.take_along_axis(ids.reshape(batch, -1), order, axis=1).astype(jnp.int32)
    parents = order // best.shape[-1]
    tokens = jnp.take_along_axis(state.tokens, parents[..., None], axis=1)
    gain = jnp.take_along_axis(gains.reshape(batch, -1), parents * vocabulary + ids, axis=1)
    log_probs = jnp.take_along_axis(state.log_probs, parents[..., None], axis=1)
    log_probs = put(log_probs, gain, state.step)

    is_last = state.step + 1 >= decoding.max_new_tokens
    ended = jnp.isin(ids, jnp.array(eos_ids))
    stops = ended | is_last
    continued = put(tokens, ids, state.step)
    texts = jnp.where(ended[..., None], tokens, continued)
    state = _add_finished(state, decoding, texts, log_probs, total, stops, ended)

    live = total + jnp.where(stops, NEG_INF, 0.0)
    live, chosen = jax.lax.top_k(live, width)
    state = state._replace(
        last_tokens=jnp.take_along_axis(ids, chosen, axis=1),
        tokens=jnp.take_along_axis(continued, chosen[..., None], axis=1),
        log_probs=jnp.take_along_axis(log_probs, chosen[..., None], axis=1),
        total_log_prob=live,
        active=state.active & _can_improve(state, decoding, live),
    )
    return state, jnp.take_along_axis(parents, chosen, axis=1)


def _can_improve(state: DecodeState, decoding: Decoding, live: jax.Array) -> jax.Array:
    """bool[B]: whether beams, float32[B, W] log-probabilities, may yet be among the best."""
    length = _length(state, decoding)[:, None]
    reachable = live[:, :1] / length**decoding.length_penalty
    worst = jnp.where(state.done, state.finished_scores.min(axis=1, keepdims=True), NEG_INF)
    improvable = (reachable > worst).any(axis=1)
    if decoding.early_stopping:
        improvable &= ~state.done.all(axis=1)
    return improvable


def _length(state: DecodeState, decoding: Decoding) -> jax.Array:
    """What the length penalty divides by, with the token of this step: float32[B]."""
    length = state.step + 1
    if decoding.length_penalty_includes_prompt:
        length = state.prefix_length + length
    return jnp.broadcast_to(length, state.prefix_length.shape).astype(jnp.float32)


def _add_finished(
    state: DecodeState,
    decoding: Decoding,
    tokens: jax.Array,
    log_probs: jax.Array,
    total: jax.Array,
    stops: jax.Array,
    ended: jax.Array,
) -> DecodeState:
    """Puts texts that have just ended among the finished ones, and keeps the best W.

    Only the first W candidates may: the others are there to go on if those end.

    Args:
      state: the beams.
      decoding: the options.
      tokens: int32[B, C, T], the candidates.
      log_probs: float32[B, C, T], of their tokens.
      total: float32[B, C], their log-probabilities.
      stops: bool[B, C], which have ended, by an end token or at max_new_tokens.
      ended: bool[B, C], which of them with an end token.
    """
    width = state.total_log_prob.shape[1]
    may_finish = stops & (jnp.arange(stops.shape[1]) < width)
    length = _length(state, decoding)[:, None]
    if not decoding.length_penalty_includes_eos:
        length = jnp.maximum(length - ended, 1)  # of an empty text
    score = total / length**decoding.length_penalty
    closed = ~state.active[:, None]
    if decoding.early_stopping:
        closed |= state.done.all(axis=1, keepdims=True)
    score = score + jnp.where(closed, NEG_INF, 0.0) + jnp.where(may_finish, 0.0, NEG_INF)
    scores = jnp.concatenate([state.finished_scores, score], axis=1)
    done = jnp.concatenate([state.done, may_finish], axis=1)
    finished_scores, chosen = jax.lax.top_k(scores, width)

    def best_of(finished: jax.Array, candidates: jax.Array) -> jax.Array:
        both = jnp.concatenate([finished, candidates], axis=1)
        return jnp.take_along_axis(both, chosen[..., None], axis=1)

    return state._replace(
        finished_tokens=best_of(state.finished_tokens, tokens),
        finished_log_probs=best_of(state.finished_log_probs, log_probs),
        finished_scores=finished_scores,
        done=jnp.take_along_axis(done, chosen, axis=1),
    )
