"""Writing texts with a language model: greedy, sampled, or by beam search.

All shapes are static and one compiled loop does the work. Branches (beams, or samples of the same
prompt) stand side by side; see `models.language`. Scores, and what beam search keeps and when it
stops, are those of transformers 5, token for token; `tests/inference` holds that.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from blip2_jax.models.kv_cache import KVCache
from blip2_jax.models.language import LanguageModel

NEVER = -1e9  # a score that loses to every real one, and still adds and divides
UNWRITTEN = 1.0  # in place of a log-probability, which cannot be above 0
# What transformers, LAVIS and others call some of the options, for "did you mean".
SYNONYMS = {
    **dict.fromkeys(("max_length", "max_len", "max_tokens"), "max_new_tokens"),
    **dict.fromkeys(("min_length", "min_len", "min_tokens"), "min_new_tokens"),
    **dict.fromkeys(("num_captions", "num_samples", "num_texts", "n"), "num_return_sequences"),
    **dict.fromkeys(("beams", "beam_size", "beam_width"), "num_beams"),
    **dict.fromkeys(("use_nucleus_sampling", "sample", "sampling"), "do_sample"),
    **dict.fromkeys(("output_scores", "scores", "logprobs"), "return_scores"),
    "ngram_size": "no_repeat_ngram_size",
}


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How texts are chosen. All of it is compiled in.

    Attributes:
      max_new_tokens: the most tokens to write, the end token included.
      min_new_tokens: the end token is not chosen before so many others.
      num_beams: width of the beam search; 1: greedy, or sampling.
      length_penalty: a beam's score is its log-probability over length ** length_penalty: above 0
        favors long texts, below 0 short ones.
      length_penalty_includes_prompt: whether that length counts the tokens of the prompt's text
        too (of an encoder-decoder, its start token).
      length_penalty_includes_eos: whether it counts the end token. Transformers since 4.36 counts
        the end token only; until 4.26 it counted the prompt only; and 4.27 to 4.35 neither, where
        prompts are given as embeddings.
      early_stopping: stop a row as soon as it has num_beams finished texts.
      repetition_penalty: scores of tokens that were seen are divided by it where positive and
        multiplied where negative (Keskar et al. 2019).
      no_repeat_ngram_size: no token is chosen that would complete so many tokens in a row that were
        seen before; 0: any.
      penalties_include_prompt: tokens of a decoder-only model's prompt count as seen in these two,
        as in transformers where it is given ids. False: only what was written, as in LAVIS, which
        gives it embeddings.
      do_sample: draw each token, instead of taking the likeliest.
      temperature, top_k, top_p: sharpen the distribution, keep its k likeliest tokens (0: all),
        and of those the fewest that hold the share p.
      num_return_sequences: how many texts a prompt; of beams the best, of samples each one.
    """

    max_new_tokens: int = 30
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    length_penalty_includes_prompt: bool = False
    length_penalty_includes_eos: bool = True
    early_stopping: bool = False
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    penalties_include_prompt: bool = True
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = self.typed(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        wrong = [
            f"{name} is {value!r}; it must be {must}"
            for name, must, good in (
                ("max_new_tokens", "at least 1", lambda x: x >= 1),
                ("min_new_tokens", "from 0 to max_new_tokens", self._at_most("max_new_tokens", 0)),
                ("num_beams", "at least 1", lambda x: x >= 1),
                ("repetition_penalty", "above 0", lambda x: x > 0),
                ("no_repeat_ngram_size", "at least 0", lambda x: x >= 0),
                ("temperature", "above 0 (greedy: do_sample=False)", lambda x: x > 0),
                ("top_k", "at least 0", lambda x: x >= 0),
                ("top_p", "above 0 and at most 1", lambda x: 0 < x <= 1),
                ("num_return_sequences", "at least 1", lambda x: x >= 1),
            )
            if not good(value := getattr(self, name))
        ]
        if self.num_beams > 1 and self.do_sample:
            wrong.append("do_sample with num_beams above 1 is not supported; choose one of them")
        if self.num_return_sequences > self.num_beams and not self.do_sample:
            wrong.append(
                f"num_return_sequences is {self.num_return_sequences} of {self.num_beams} beams; "
                "raise num_beams, or set do_sample=True"
            )
        if wrong:
            raise ValueError("; ".join(wrong) + ".")

    @classmethod
    def typed(cls, name: str, value: Any) -> Any:
        """The value of an option as Python's own of its type; of None, the option's default.

        Raises:
          ValueError: it is of another kind, as 2.5 beams.
        """
        default = getattr(cls, name)
        if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # NumPy's, JAX's, PyTorch's
            value = value.item()
        if value is None:
            return default
        kind, number = type(default), isinstance(value, (int, float)) and math.isfinite(value)
        if kind is bool and number and value in (0, 1):
            return bool(value)
        if kind in (int, float) and number and not isinstance(value, bool):
            if kind is float or value == int(value):
                return kind(value)
        must = {bool: "True or False", int: "a whole number", float: "a finite number"}
        raise ValueError(f"{name} is {value!r}; it must be {must[kind]}.")

    def _at_most(self, other: str, least: int) -> Callable[[int], bool]:
        return lambda x: least <= x <= getattr(self, other)

    @property
    def branches(self) -> int:
        """W: tokens of a row that are written side by side."""
        return self.num_return_sequences if self.do_sample else self.num_beams


class Prompt(NamedTuple):
    """What stands before the texts to write.

    Attributes:
      embeds: float[B, P, D], soft prompts, embedded text, or both.
      mask: int32[B, P], 0 at padding.
      said_ids, said_mask: int32[B, T], the tokens that stand before the first new one in the row
        that is written: the prompt's text or, of an encoder-decoder, the start token.
      row: int32[B], each row's place in the request: the seed of its samples, so that they do
        not depend on what else is in the batch.
    """

    embeds: jax.Array
    mask: jax.Array
    said_ids: jax.Array
    said_mask: jax.Array
    row: jax.Array


class State(NamedTuple):
    """A loop half-way. B rows, W branches, T tokens at most, V vocabulary.

    Attributes:
      step: int32[], tokens chosen so far.
      new: int32[B, W], the last ones chosen, which the language model has not read yet.
      cache: the language model's.
      lineage: bool[B, W, T * W], which slots of the cache each branch is made of.
      said: bool[B, W, V], tokens that the repetition penalty bears on; V = 0 without one.
      prefix_ids, prefix_mask: int32[B, P], what repeated n-grams may begin in; P = 0 without.
      tokens: int32[B, W, T], the branches, padded.
      log_probs: float32[B, W, T], of their tokens, the end token included; then UNWRITTEN.
      total: float32[B, W], log-probability of each branch.
      done: bool[B, W], greedy and sampled: ended; beams: `best` holds a finished text here.
      best: int32[B, W, T], finished texts of a beam search, best first.
      best_log_probs: float32[B, W, T], of their tokens.
      best_score: float32[B, W], their scores.
      open: bool[B], whether a row of a beam search can still get better.
      row: int32[B], see `Prompt`.
      before: int32[B], how many tokens were said before.
    """

    step: jax.Array
    new: jax.Array
    cache: KVCache
    lineage: jax.Array
    said: jax.Array
    prefix_ids: jax.Array
    prefix_mask: jax.Array
    tokens: jax.Array
    log_probs: jax.Array
    total: jax.Array
    done: jax.Array
    best: jax.Array
    best_log_probs: jax.Array
    best_score: jax.Array
    open: jax.Array
    row: jax.Array
    before: jax.Array


class Texts(NamedTuple):
    """What was written. B rows, R = num_return_sequences, T tokens at most.

    Attributes:
      tokens: int32[B, R, T], padded; end tokens are not part of it.
      scores: float32[B, R], log-probabilities, of beams divided as `length_penalty` says.
      log_probs: float32[B, R, T], of each token and of the end token; UNWRITTEN after it. They are
        those of the distribution that the token was chosen from, as transformers'
        `compute_transition_scores` has them.
    """

    tokens: jax.Array
    scores: jax.Array
    log_probs: jax.Array


def decode(
    llm: LanguageModel,
    prompt: Prompt,
    how: Decoding,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    key: jax.Array,
) -> Texts:
    """Continues prompts until each ends or is `max_new_tokens` long.

    Args:
      llm: a language model of any family.
      prompt: what to continue.
      how: see `Decoding`.
      eos_ids: tokens that end a text; they are not part of the result.
      pad_id: what stands after the end.
      key: randomness of sampling.
    """
    fixed: dict[str, Any] = {"eos_ids": eos_ids, "pad_id": pad_id, "key": key}
    state = jax.lax.while_loop(
        lambda state: ~finished(state, how),
        lambda state: advance(llm, state, how, **fixed),
        begin(llm, prompt, how, **fixed),
    )
    if how.num_beams == 1:
        return Texts(state.tokens, state.total, state.log_probs)
    found = (state.best, state.best_score, state.best_log_probs)
    return Texts(*(x[:, : how.num_return_sequences] for x in found))


def begin(
    llm: LanguageModel,
    prompt: Prompt,
    how: Decoding,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    key: jax.Array,
) -> State:
    """Reads the prompts, and chooses the first tokens."""
    batch, width, length = len(prompt.mask), how.branches, how.max_new_tokens
    scores, cache = llm.prefill(prompt.embeds, prompt.mask, length * width)
    vocabulary = scores.shape[-1]
    seen = prompt.said_mask * how.penalties_include_prompt
    said = jnp.zeros((batch, width, 0), bool)
    if how.repetition_penalty != 1.0:
        ids = jnp.where(seen > 0, prompt.said_ids, vocabulary)
        said = jnp.zeros((batch, vocabulary + 1), bool)
        said = said.at[jnp.arange(batch)[:, None], ids].set(True)[:, None, :-1]
        said = jnp.broadcast_to(said, (batch, width, vocabulary))
    # All beams are the same at first: only one of them may go on.
    total = jnp.zeros((batch, width))
    if how.num_beams > 1:
        total = total.at[:, 1:].set(NEVER)
    tokens = jnp.full((batch, width, length), pad_id, jnp.int32)
    log_probs = jnp.full(tokens.shape, UNWRITTEN)
    prefix = slice(None if how.no_repeat_ngram_size else 0)
    state = State(
        step=jnp.int32(0),
        new=tokens[..., 0],
        cache=cache,
        lineage=jnp.zeros((batch, width, length * width), bool),
        said=said,
        prefix_ids=prompt.said_ids[:, prefix],
        prefix_mask=seen[:, prefix],
        tokens=tokens,
        log_probs=log_probs,
        total=total,
        done=jnp.zeros((batch, width), bool),
        best=tokens,
        best_log_probs=log_probs,
        best_score=jnp.full((batch, width), NEVER),
        open=jnp.ones(batch, bool),
        row=prompt.row,
        before=prompt.said_mask.sum(axis=1, dtype=jnp.int32),
    )
    scores = jnp.broadcast_to(scores[:, None], (batch, width, vocabulary))
    return _choose(scores, state, how, eos_ids, pad_id, key)


def advance(
    llm: LanguageModel,
    state: State,
    how: Decoding,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    key: jax.Array,
) -> State:
    """Lets the language model read the last tokens, and chooses the next."""
    width, step = state.new.shape[1], state.step - 1
    scores, cache = llm.decode_step(state.new, state.cache, state.lineage, step)
    slot = jnp.arange(state.lineage.shape[-1]) - step * width
    lineage = state.lineage | (slot == jnp.arange(width)[:, None])
    state = state._replace(cache=cache, lineage=lineage)
    return _choose(scores, state, how, eos_ids, pad_id, key)


def finished(state: State, how: Decoding) -> jax.Array:
    """bool[]: whether nothing remains to be written."""
    ended = state.done.all() if how.num_beams == 1 else ~state.open.any()
    return ended | (state.step >= how.max_new_tokens)


def _choose(
    scores: jax.Array,
    state: State,
    how: Decoding,
    eos_ids: tuple[int, ...],
    pad_id: int,
    key: jax.Array,
) -> State:
    """Chooses a token for every branch, given scores float32[B, W, V]."""
    if how.num_beams > 1:
        state, parents = _choose_beams(scores, state, how, eos_ids)
        # A branch is made of what its parent is made of.
        inherit = lambda x: jnp.take_along_axis(x, parents[..., None], axis=1)  # noqa: E731
        state = state._replace(lineage=inherit(state.lineage), said=inherit(state.said))
    else:
        state = _choose_alone(scores, state, how, eos_ids, pad_id, key)
    if how.repetition_penalty != 1.0:
        state = state._replace(
            said=state.said | (state.new[..., None] == jnp.arange(scores.shape[-1]))
        )
    return state._replace(step=state.step + 1)


def _adjust(scores: jax.Array, state: State, how: Decoding, eos_ids: tuple[int, ...]) -> jax.Array:
    """Penalties of repetitions and least length, in transformers' order: float32[B, W, V]."""
    if how.repetition_penalty != 1.0:
        penalty = how.repetition_penalty
        lowered = jnp.where(scores < 0, scores * penalty, scores / penalty)
        scores = jnp.where(state.said, lowered, scores)
    if how.no_repeat_ngram_size:
        repeats = _repeats(state, how.no_repeat_ngram_size, scores.shape[-1])
        scores = jnp.where(repeats, -jnp.inf, scores)
    if how.min_new_tokens:
        is_eos = jnp.isin(jnp.arange(scores.shape[-1]), jnp.array(eos_ids))
        scores = jnp.where(is_eos & (state.step < how.min_new_tokens), -jnp.inf, scores)
    return scores


def _repeats(state: State, size: int, vocabulary: int) -> jax.Array:
    """bool[B, W, V]: which tokens would complete `size` tokens that were seen in a row before."""
    batch, width, length = state.tokens.shape
    whole = lambda x: jnp.broadcast_to(x[:, None], (batch, width, x.shape[1]))  # noqa: E731
    written = jnp.broadcast_to(jnp.arange(length) < state.step, state.tokens.shape)
    seen = jnp.concatenate([whole(state.prefix_ids), state.tokens], axis=-1)
    real = jnp.concatenate([whole(state.prefix_mask > 0), written], axis=-1)
    before = state.prefix_ids.shape[1] + state.step  # tokens so far, padding included
    # In front, room for what would stand before the first tokens, which repeats nothing.
    seen, real = (jnp.pad(x, ((0, 0), (0, 0), (size - 1, 0))) for x in (seen, real))
    last = lambda x: jax.lax.dynamic_slice_in_dim(x, before, size - 1, axis=-1)  # noqa: E731
    count = seen.shape[-1] - size + 1
    matches = real[..., size - 1 :] & last(real).all(axis=-1, keepdims=True)
    for place in range(size - 1):
        at = slice(place, place + count)
        matches &= real[..., at] & (seen[..., at] == last(seen)[..., place, None])
    ids = jnp.where(matches, seen[..., size - 1 :], vocabulary)
    rows, branches = jnp.ogrid[:batch, :width]
    banned = jnp.zeros((batch, width, vocabulary + 1), bool)
    return banned.at[rows[..., None], branches[..., None], ids].set(True)[..., :-1]


def _put(tokens: jax.Array, new: jax.Array, step: jax.Array) -> jax.Array:
    """Writes [B, W] into [B, W, T] at `step`."""
    return jax.lax.dynamic_update_slice_in_dim(tokens, new[..., None], step, axis=-1)


# ------------------------------------------------------------------------- greedy and sampling


def _choose_alone(
    scores: jax.Array,
    state: State,
    how: Decoding,
    eos_ids: tuple[int, ...],
    pad_id: int,
    key: jax.Array,
) -> State:
    """The next token of branches that know nothing of each other."""
    scores = _adjust(scores, state, how, eos_ids)
    if how.do_sample:
        scores = _sharpen(scores, how)
        new = _sample(scores, state.row, jax.random.fold_in(key, state.step))
    else:
        new = scores.argmax(axis=-1).astype(jnp.int32)
    gain = jnp.take_along_axis(jax.nn.log_softmax(scores), new[..., None], axis=-1)[..., 0]
    log_probs = _put(state.log_probs, jnp.where(state.done, UNWRITTEN, gain), state.step)
    done = state.done | jnp.isin(new, jnp.array(eos_ids))
    new = jnp.where(done, pad_id, new)
    return state._replace(
        new=new,
        tokens=_put(state.tokens, new, state.step),
        log_probs=log_probs,
        total=jnp.where(state.done, state.total, state.total + gain),
        done=done,
    )


def _sharpen(scores: jax.Array, how: Decoding) -> jax.Array:
    """Temperature, then top-k, then top-p: float32[B, W, V] with -inf where never drawn."""
    scores = scores / how.temperature
    if how.top_k:
        least = jax.lax.top_k(scores, min(how.top_k, scores.shape[-1]))[0][..., -1:]
        scores = jnp.where(scores < least, -jnp.inf, scores)
    if how.top_p < 1.0:
        ordered = jnp.sort(scores, axis=-1)
        # From the least likely on, drop tokens until dropping more would go below the share p.
        dropped = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) <= 1 - how.top_p
        dropped = dropped.at[..., -1].set(False)
        least = jnp.where(dropped, jnp.inf, ordered).min(axis=-1, keepdims=True)
        scores = jnp.where(scores < least, -jnp.inf, scores)
    return scores


def _sample(scores: jax.Array, row: jax.Array, key: jax.Array) -> jax.Array:
    """int32[B, W], drawn with randomness of each row's own."""
    width, vocabulary = scores.shape[1:]
    noise = jax.vmap(lambda r: jax.random.gumbel(jax.random.fold_in(key, r), (width, vocabulary)))
    return (scores + noise(row)).argmax(axis=-1).astype(jnp.int32)


# ---------------------------------------------------------------------------------------- beams


def _choose_beams(
    scores: jax.Array, state: State, how: Decoding, eos_ids: tuple[int, ...]
) -> tuple[State, jax.Array]:
    """The next token of every beam, and which beam it continues, int32[B, W]."""
    batch, width, vocabulary = scores.shape
    keep = max(2, 1 + len(eos_ids)) * width  # enough to go on if the best ones all end
    gains = _adjust(jax.nn.log_softmax(scores), state, how, eos_ids)
    # The best of each beam, then the best of all.
    each, ids = jax.lax.top_k(
        (gains + state.total[..., None]).reshape(batch * width, vocabulary), min(keep, vocabulary)
    )
    total, order = jax.lax.top_k(each.reshape(batch, -1), keep)
    ids = jnp.take_along_axis(ids.reshape(batch, -1), order, axis=1).astype(jnp.int32)
    parents = order // each.shape[-1]
    tokens = jnp.take_along_axis(state.tokens, parents[..., None], axis=1)
    gain = jnp.take_along_axis(gains.reshape(batch, -1), parents * vocabulary + ids, axis=1)
    log_probs = jnp.take_along_axis(state.log_probs, parents[..., None], axis=1)
    log_probs = _put(log_probs, gain, state.step)

    last = state.step + 1 >= how.max_new_tokens
    ended = jnp.isin(ids, jnp.array(eos_ids))
    stops = ended | last
    with_new = _put(tokens, ids, state.step)
    texts = jnp.where(ended[..., None], tokens, with_new)
    state = _finish(state, how, texts, log_probs, total, stops, ended)

    going = total + jnp.where(stops, NEVER, 0.0)
    going, chosen = jax.lax.top_k(going, width)
    pick = lambda x: jnp.take_along_axis(x, chosen, axis=1)  # noqa: E731
    tokens = jnp.take_along_axis(with_new, chosen[..., None], axis=1)
    log_probs = jnp.take_along_axis(log_probs, chosen[..., None], axis=1)
    state = state._replace(new=pick(ids), tokens=tokens, log_probs=log_probs, total=going)
    reach = going[:, :1] / _length(state, how, state.step + 1)[:, None] ** how.length_penalty
    worst = jnp.where(state.done, state.best_score.min(axis=1, keepdims=True), NEVER)
    hopeful = (reach > worst).any(axis=1)
    if how.early_stopping:
        hopeful &= ~state.done.all(axis=1)
    return state._replace(open=state.open & hopeful), pick(parents)


def _length(state: State, how: Decoding, generated: jax.Array) -> jax.Array:
    """What the length penalty divides by, before the end token is left out: float32[B]."""
    before = state.before if how.length_penalty_includes_prompt else jnp.zeros_like(state.row)
    return (before + generated).astype(jnp.float32)


def _finish(
    state: State,
    how: Decoding,
    tokens: jax.Array,
    log_probs: jax.Array,
    total: jax.Array,
    stops: jax.Array,
    ended: jax.Array,
) -> State:
    """Lets texts that have just ended take their place among the finished ones.

    Only the first W candidates may: the others are there to go on if those end.

    Args:
      state: the beams.
      how: see `Decoding`.
      tokens: int32[B, C, T], the candidates.
      log_probs: float32[B, C, T], of their tokens.
      total: float32[B, C], their log-probabilities.
      stops: bool[B, C], which have ended, for want of room too.
      ended: bool[B, C], which of them with an end token.
    """
    width = state.total.shape[1]
    first = stops & (jnp.arange(stops.shape[1]) < width)
    length = _length(state, how, state.step + 1)[:, None]
    if not how.length_penalty_includes_eos:
        length = jnp.maximum(length - ended, 1)  # of an empty text
    score = total / length**how.length_penalty
    closed = ~state.open[:, None]
    if how.early_stopping:
        closed |= state.done.all(axis=1, keepdims=True)
    score = score + jnp.where(closed, NEVER, 0.0) + jnp.where(first, 0.0, NEVER)
    scores = jnp.concatenate([state.best_score, score], axis=1)
    done = jnp.concatenate([state.done, first], axis=1)
    best_score, chosen = jax.lax.top_k(scores, width)
    take = lambda old, new: jnp.take_along_axis(  # noqa: E731
        jnp.concatenate([old, new], axis=1), chosen[..., None], axis=1
    )
    return state._replace(
        best=take(state.best, tokens),
        best_log_probs=take(state.best_log_probs, log_probs),
        best_score=best_score,
        done=jnp.take_along_axis(done, chosen, axis=1),
    )
