"""The decoding loop: greedy, sampled, or by beam search.

All shapes are static and one compiled loop does the work. Sequences of a prompt (beams, or samples)
are generated side by side; see `models.kv_cache`. Scores, and what beam search keeps and when it
stops, are those of transformers 5, token for token; `tests/inference` holds that.
"""

from typing import Any

import jax
import jax.numpy as jnp

from blip2_jax.inference.beam_search import choose_beams
from blip2_jax.inference.decode_state import (
    NEG_INF,
    NO_LOG_PROB,
    DecodeOutput,
    DecodeState,
    Prompt,
    put,
)
from blip2_jax.inference.logits import process_logits, sample, warp_logits
from blip2_jax.inference.options import Decoding
from blip2_jax.models.language import LanguageModel


def decode(
    llm: LanguageModel,
    prompt: Prompt,
    decoding: Decoding,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    key: jax.Array,
) -> DecodeOutput:
    """Continues prompts until each ends or is `max_new_tokens` long.

    Args:
      llm: a language model of any family.
      prompt: what to continue.
      decoding: see `Decoding`.
      eos_ids: tokens that end a text; they are not part of the result.
      pad_id: what stands after the end.
      key: randomness of sampling.
    """
    fixed: dict[str, Any] = {"eos_ids": eos_ids, "pad_id": pad_id, "key": key}
    state = jax.lax.while_loop(
        lambda state: ~is_finished(state, decoding),
        lambda state: decode_step(llm, state, decoding, **fixed),
        prefill(llm, prompt, decoding, **fixed),
    )
    if decoding.num_beams == 1:
        return DecodeOutput(state.tokens, state.total_log_prob, state.log_probs)
    best = (state.finished_tokens, state.finished_scores, state.finished_log_probs)
    return DecodeOutput(*(x[:, : decoding.num_return_sequences] for x in best))


def prefill(
    llm: LanguageModel,
    prompt: Prompt,
    decoding: Decoding,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    key: jax.Array,
) -> DecodeState:
    """Reads the prompts, and chooses the first tokens."""
    batch, width, length = len(prompt.mask), decoding.num_sequences, decoding.max_new_tokens
    logits, cache = llm.prefill(prompt.embeds, prompt.mask, length * width)
    vocabulary = logits.shape[-1]
    prefix_mask = prompt.prefix_mask * decoding.penalties_include_prompt
    seen_tokens = jnp.zeros((batch, width, 0), bool)
    if decoding.repetition_penalty != 1.0:
        ids = jnp.where(prefix_mask > 0, prompt.prefix_ids, vocabulary)
        seen_tokens = jnp.zeros((batch, vocabulary + 1), bool)
        seen_tokens = seen_tokens.at[jnp.arange(batch)[:, None], ids].set(True)[:, None, :-1]
        seen_tokens = jnp.broadcast_to(seen_tokens, (batch, width, vocabulary))
    # All beams are the same at first: only one of them may go on.
    total_log_prob = jnp.zeros((batch, width))
    if decoding.num_beams > 1:
        total_log_prob = total_log_prob.at[:, 1:].set(NEG_INF)
    tokens = jnp.full((batch, width, length), pad_id, jnp.int32)
    log_probs = jnp.full(tokens.shape, NO_LOG_PROB)
    prefix = slice(None if decoding.no_repeat_ngram_size else 0)
    state = DecodeState(
        step=jnp.int32(0),
        last_tokens=tokens[..., 0],
        cache=cache,
        ancestor_mask=jnp.zeros((batch, width, length * width), bool),
        seen_tokens=seen_tokens,
        prefix_ids=prompt.prefix_ids[:, prefix],
        prefix_mask=prefix_mask[:, prefix],
        prefix_length=prompt.prefix_mask.sum(axis=1, dtype=jnp.int32),
        request_index=prompt.request_index,
        tokens=tokens,
        log_probs=log_probs,
        total_log_prob=total_log_prob,
        done=jnp.zeros((batch, width), bool),
        finished_tokens=tokens,
        finished_log_probs=log_probs,
        finished_scores=jnp.full((batch, width), NEG_INF),
        active=jnp.ones(batch, bool),
    )
    logits = jnp.broadcast_to(logits[:, None], (batch, width, vocabulary))
    return _choose(logits, state, decoding, eos_ids, pad_id, key)


def decode_step(
    llm: LanguageModel,
    state: DecodeState,
    decoding: Decoding,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    key: jax.Array,
) -> DecodeState:
    """Lets the language model read the last tokens, and chooses the next."""
    width, step = state.last_tokens.shape[1], state.step - 1
    logits, cache = llm.decode_step(state.last_tokens, state.cache, state.ancestor_mask, step)
    slot = jnp.arange(state.ancestor_mask.shape[-1]) - step * width
    ancestor_mask = state.ancestor_mask | (slot == jnp.arange(width)[:, None])
    state = state._replace(cache=cache, ancestor_mask=ancestor_mask)
    return _choose(logits, state, decoding, eos_ids, pad_id, key)


def is_finished(state: DecodeState, decoding: Decoding) -> jax.Array:
    """bool[]: whether nothing remains to be generated."""
    ended = state.done.all() if decoding.num_beams == 1 else ~state.active.any()
    return ended | (state.step >= decoding.max_new_tokens)


def _choose(
    logits: jax.Array,
    state: DecodeState,
    decoding: Decoding,
    eos_ids: tuple[int, ...],
    pad_id: int,
    key: jax.Array,
) -> DecodeState:
    """Chooses a token for every sequence, given logits float32[B, W, V]."""
    if decoding.num_beams > 1:
        state, parents = choose_beams(logits, state, decoding, eos_ids)
        # A sequence has the ancestors and the seen tokens of its parent.
        state = state._replace(
            ancestor_mask=jnp.take_along_axis(state.ancestor_mask, parents[..., None], axis=1),
            seen_tokens=jnp.take_along_axis(state.seen_tokens, parents[..., None], axis=1),
        )
    else:
        state = _choose_independent(logits, state, decoding, eos_ids, pad_id, key)
    if decoding.repetition_penalty != 1.0:
        is_new = state.last_tokens[..., None] == jnp.arange(logits.shape[-1])
        state = state._replace(seen_tokens=state.seen_tokens | is_new)
    return state._replace(step=state.step + 1)


def _choose_independent(
    logits: jax.Array,
    state: DecodeState,
    decoding: Decoding,
    eos_ids: tuple[int, ...],
    pad_id: int,
    key: jax.Array,
) -> DecodeState:
    """The next token of each sequence by itself: the likeliest, or a sample."""
    logits = process_logits(logits, state, decoding, eos_ids)
    if decoding.do_sample:
        logits = warp_logits(logits, decoding)
        new = sample(logits, state.request_index, jax.random.fold_in(key, state.step))
    else:
        new = logits.argmax(axis=-1).astype(jnp.int32)
    gain = jnp.take_along_axis(jax.nn.log_softmax(logits), new[..., None], axis=-1)[..., 0]
    log_probs = put(state.log_probs, jnp.where(state.done, NO_LOG_PROB, gain), state.step)
    done = state.done | jnp.isin(new, jnp.array(eos_ids))
    new = jnp.where(done, pad_id, new)
    return state._replace(
        last_tokens=new,
        tokens=put(state.tokens, new, state.step),
        log_probs=log_probs,
        total_log_prob=jnp.where(state.done, state.total_log_prob, state.total_log_prob + gain),
        done=done,
    )
