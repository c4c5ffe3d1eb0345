"""What a decoding loop reads, carries and returns."""

from typing import NamedTuple

import jax

from blip2_jax.models.kv_cache import KVCache

NEG_INF = -1e9  # a score below every real one; finite, so that it can be added and divided
NO_LOG_PROB = 1.0  # after a text's end; real log-probabilities are never above 0


class Prompt(NamedTuple):
    """What texts continue.

    Attributes:
      embeds: float[B, P, D], soft prompts, embedded text, or both.
      mask: int32[B, P], 0 at padding.
      prefix_ids, prefix_mask: int32[B, T], tokens before the first generated one: the prompt's text
        or, of an encoder-decoder, the start token.
      request_index: int32[B], each prompt's number in the request. It seeds the prompt's samples,
        so that they do not depend on the rest of the batch.
    """

    embeds: jax.Array
    mask: jax.Array
    prefix_ids: jax.Array
    prefix_mask: jax.Array
    request_index: jax.Array


class DecodeState(NamedTuple):
    """What the loop carries. B prompts, W sequences of each, T tokens at most, V vocabulary.

    Attributes:
      step: int32[], tokens generated so far.
      last_tokens: int32[B, W], the newest ones, which the language model has not read yet.
      cache: the language model's keys and values.
      ancestor_mask: bool[B, W, T * W], which slots of the cache each sequence is made of.
      seen_tokens: bool[B, W, V], tokens that the repetition penalty bears on; V = 0 without one.
      prefix_ids, prefix_mask: int32[B, P], where repeated n-grams may begin; P = 0 without them.
      prefix_length: int32[B], tokens before the first generated one.
      request_index: int32[B], see `Prompt`.
      tokens: int32[B, W, T], the sequences (beams: those that go on), padded.
      log_probs: float32[B, W, T], of their tokens, the end token included; then NO_LOG_PROB.
      total_log_prob: float32[B, W], of each sequence.
      done: bool[B, W], greedy and sampled: ended; beams: whether `finished_tokens` has a text here.
      finished_tokens: int32[B, W, T], ended texts of a beam search, best first.
      finished_log_probs: float32[B, W, T], of their tokens.
      finished_scores: float32[B, W], log-probabilities divided as `length_penalty` says.
      active: bool[B], whether a beam search can still find better texts.
    """

    step: jax.Array
    last_tokens: jax.Array
    cache: KVCache
    ancestor_mask: jax.Array
    seen_tokens: jax.Array
    prefix_ids: jax.Array
    prefix_mask: jax.Array
    prefix_length: jax.Array
    request_index: jax.Array
    tokens: jax.Array
    log_probs: jax.Array
    total_log_prob: jax.Array
    done: jax.Array
    finished_tokens: jax.Array
    finished_log_probs: jax.Array
    finished_scores: jax.Array
    active: jax.Array


class DecodeOutput(NamedTuple):
    """Generated texts. B prompts, R = num_return_sequences, T tokens at most.

    Attributes:
      tokens: int32[B, R, T], padded; end tokens are not part of it.
      scores: float32[B, R], log-probabilities, of beams divided as `length_penalty` says.
      log_probs: float32[B, R, T], of each token and of the end token; NO_LOG_PROB after it. They
        are those of the distribution that the token was chosen from, as transformers'
        `compute_transition_scores` has them.
    """

    tokens: jax.Array
    scores: jax.Array
    log_probs: jax.Array


def put(values: jax.Array, new: jax.Array, step: jax.Array) -> jax.Array:
    """Puts [B, W] into [B, W, T] at `step`."""
    return jax.lax.dynamic_update_slice_in_dim(values, new[..., None], step, axis=-1)
