"""What all language models offer, whatever their family: scoring a text, and writing one.

Writing goes by `start` and `extend`. The prompt is read once, and W branches (beams, samples) of
each row continue it side by side: a step is a call with W tokens a row, each of which sees the
prompt and those earlier tokens that its own branch is made of. So no cache is ever reordered or
copied for a branch, and the prompt's keys and values are held once.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from blip2_jax.models.layers import Segment, causal_mask, write


class Memory(NamedTuple):
    """What a language model has read and written so far.

    Keys and values are by layer, as `layers.Stack` has them: stacked, or a list.

    Attributes:
      prompt: keys and values of the prompt, two of float[L, B, H, P, K]; of an encoder-decoder,
        those that its decoder makes of the encoder's output.
      prompt_mask: bool[B, P].
      written: keys and values of what was written, two of float[L, B, H, S, K].
    """

    prompt: Any
    prompt_mask: jax.Array
    written: Any


class LanguageModel(Protocol):
    """The interface of `opt.OPT`, `llama.Llama` and `t5.T5`."""

    def embed(self, ids: jax.Array) -> jax.Array:
        """Token embeddings: int32[B, T] -> float[B, T, D]."""

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token scores: float[B, T, D] -> float32[B, T, V]."""

    def score(
        self,
        prompt: jax.Array,
        prompt_mask: jax.Array,
        ids: jax.Array,
        mask: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Scores of the text that follows a prompt.

        Args:
          prompt: float[B, P, D], soft prompts, embedded text, or both.
          prompt_mask: int32[B, P].
          ids, mask: int32[B, T], text with padding on either side (an encoder-decoder's: right).
          key: randomness for dropout, or None.

        Returns:
          float32[B, T, V]: position t holds the scores of token t, given the prompt and the tokens
          before it.
        """

    def start(self, prompt: jax.Array, mask: jax.Array, slots: int) -> tuple[jax.Array, Memory]:
        """Reads prompts.

        Args:
          prompt: float[B, P, D].
          mask: int32[B, P], 0 at padding, which may stand anywhere but at the end of a prompt (an
            encoder-decoder's: anywhere).
          slots: how many tokens, of all branches together, will be written.

        Returns:
          float32[B, V], the scores of the first token to write; and the memory.
        """

    def extend(
        self, ids: jax.Array, memory: Memory, seen: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Memory]:
        """Writes one token a branch, into the slots from `step * W` on.

        Args:
          ids: int32[B, W].
          memory: what came before.
          seen: bool[B, W, slots], the earlier slots that a branch continues (not its own new one).
          step: int32[], how many tokens each branch has written before.

        Returns:
          float32[B, W, V], scores of the next tokens; and the memory.
        """


def segments(past: Any, memory: Memory | None, seen: jax.Array | None) -> list[Segment]:
    """One layer's part of a memory, as attention reads it.

    Args:
      past: the layer's keys and values of the prompt, two of float[B, H, P, K], and of what was
        written, two of float[B, H, S, K]; None where nothing was read yet.
      memory: whose part `past` is.
      seen: bool[B, 1, T, S], which of what was written each token sees.
    """
    if past is None or memory is None:
        return []
    (prompt_k, prompt_v), (written_k, written_v) = past
    return [
        Segment(prompt_k, prompt_v, memory.prompt_mask[:, None, None]),
        Segment(written_k, written_v, seen),
    ]


def own_only(width: int) -> jax.Array:
    """bool[1, 1, W, W]: side by side, each new token sees itself and no other branch's."""
    return jnp.eye(width, dtype=bool)[None, None]


class DecoderOnly(nnx.Module):
    """A language model that reads soft prompts and text in one row (OPT, Llama).

    Subclasses define `embed`, `logits`, `empty_cache` and `run`.
    """

    def embed(self, ids: jax.Array) -> jax.Array:
        """See `LanguageModel.embed`."""
        raise NotImplementedError

    def logits(self, hidden: jax.Array) -> jax.Array:
        """See `LanguageModel.logits`."""
        raise NotImplementedError

    def empty_cache(self, batch: int, slots: int, dtype: Any) -> Any:
        """Room for keys and values of `slots` tokens in each of `batch` rows, by layer."""
        raise NotImplementedError

    def run(
        self,
        embeds: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        memory: Memory | None = None,
        seen: jax.Array | None = None,
        *,
        keep: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Runs all layers.

        Args:
          embeds: float[B, T, D], token embeddings or anything in their place.
          positions: int32[B, T], counted over real tokens; -1 at padding.
          mask: bool, broadcastable to [B, 1, T, T]: who sees whom among these.
          memory: what stands before them; all see its prompt.
          seen: bool[B, 1, T, S], which of what was written there each sees.
          keep: whether to return keys and values.
          key: randomness for dropout, or None.

        Returns:
          float[B, T, D] after the final norm; and keys and values by layer (None unless `keep`).
        """
        raise NotImplementedError

    def __call__(
        self, embeds: jax.Array, mask: jax.Array, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Hidden states of whole rows: float[B, T, D] under mask int32[B, T] -> float[B, T, D].

        Positions count real tokens, so padding on either side changes nothing.
        """
        return self.run(embeds, _positions(mask), _causal(mask), key=key)[0]

    def score(
        self,
        prompt: jax.Array,
        prompt_mask: jax.Array,
        ids: jax.Array,
        mask: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """See `LanguageModel.score`."""
        length = prompt.shape[1]
        embeds = jnp.concatenate([prompt, self.embed(ids).astype(prompt.dtype)], axis=1)
        hidden = self(embeds, jnp.concatenate([prompt_mask, mask], axis=1), key=key)
        return self.logits(hidden[:, length - 1 : -1])

    def start(self, prompt: jax.Array, mask: jax.Array, slots: int) -> tuple[jax.Array, Memory]:
        """See `LanguageModel.start`."""
        hidden, read = self.run(prompt, _positions(mask), _causal(mask), keep=True)
        written = self.empty_cache(len(prompt), slots, hidden.dtype)
        return self.logits(hidden[:, -1:])[:, 0], Memory(read, mask > 0, written)

    def extend(
        self, ids: jax.Array, memory: Memory, seen: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Memory]:
        """See `LanguageModel.extend`."""
        width = ids.shape[1]
        length = memory.prompt_mask.sum(axis=1, dtype=jnp.int32)
        positions = jnp.broadcast_to((length + step)[:, None], ids.shape)
        hidden, new = self.run(
            self.embed(ids), positions, own_only(width), memory, seen[:, None], keep=True
        )
        memory = memory._replace(written=write(memory.written, new, step * width))
        return self.logits(hidden), memory


def _positions(mask: jax.Array) -> jax.Array:
    """int32[B, T]: 0, 1, 2, ... over real tokens, -1 at padding."""
    return jnp.where(mask > 0, jnp.cumsum(mask, axis=1) - 1, -1)


def _causal(mask: jax.Array) -> jax.Array:
    """bool[B, 1, T, T]: everything real up to oneself."""
    length = mask.shape[1]
    return causal_mask(length, length) & (mask > 0)[:, None, None]
