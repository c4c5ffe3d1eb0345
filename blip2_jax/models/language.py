"""The interface of all language models: logits of a given text, and incremental decoding.

Decoding is one `prefill` of the prompt and then `decode_step`s. W sequences (beams, or samples of
one prompt) continue each prompt side by side: a step is a call with W tokens for each prompt, each
of which sees the prompt and the generated tokens of its own sequence (`models.kv_cache`).
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from blip2_jax.models.attention import causal_mask
from blip2_jax.models.kv_cache import KVCache, new_token_mask, update_cache


class LanguageModel(Protocol):
    """The interface of `opt.OPT`, `llama.Llama` and `t5.T5`."""

    def embed(self, ids: jax.Array) -> jax.Array:
        """Token embeddings: int32[B, T] -> float[B, T, D]."""

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token logits: float[B, T, D] -> float32[B, T, V]."""

    def score(
        self,
        prompt: jax.Array,
        prompt_mask: jax.Array,
        ids: jax.Array,
        mask: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the text that follows a prompt.

        Args:
          prompt: float[B, P, D], soft prompts, embedded text, or both.
          prompt_mask: int32[B, P].
          ids, mask: int32[B, T], text with padding on either side (an encoder-decoder's: right).
          key: randomness for dropout, or None.

        Returns:
          float32[B, T, V]: position t holds the logits of token t, given the prompt and the tokens
          before it.
        """

    def prefill(self, prompt: jax.Array, mask: jax.Array, slots: int) -> tuple[jax.Array, KVCache]:
        """Reads prompts into a new cache.

        Args:
          prompt: float[B, P, D].
          mask: int32[B, P], 0 at padding, which may stand anywhere but at the end of a prompt (an
            encoder-decoder's: anywhere).
          slots: how many tokens will be generated, those of all sequences of a prompt together.

        Returns:
          float32[B, V], the logits of the first token to generate; and the cache.
        """

    def decode_step(
        self, ids: jax.Array, cache: KVCache, ancestor_mask: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """Reads one token of each sequence, into the slots from `step * W` on.

        Args:
          ids: int32[B, W], the last token of each sequence.
          cache: keys and values of what came before.
          ancestor_mask: bool[B, W, slots], the earlier slots that a sequence is made of (not the
            slot of its token in `ids`).
          step: int32[], how many tokens of each sequence are in the cache.

        Returns:
          float32[B, W, V], logits of the next tokens; and the cache.
        """


class DecoderOnly(nnx.Module):
    """A language model that reads soft prompts and text in one sequence (OPT, Llama).

    Subclasses define `embed`, `logits`, `empty_cache` and `run`.
    """

    def embed(self, ids: jax.Array) -> jax.Array:
        """See `LanguageModel.embed`."""
        raise NotImplementedError

    def logits(self, hidden: jax.Array) -> jax.Array:
        """See `LanguageModel.logits`."""
        raise NotImplementedError

    def empty_cache(self, batch: int, slots: int, dtype: Any) -> Any:
        """Zeros for keys and values of `slots` tokens for each of `batch` prompts, by layer."""
        raise NotImplementedError

    def run(
        self,
        embeds: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: KVCache | None = None,
        ancestor_mask: jax.Array | None = None,
        *,
        return_kv: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Runs all layers.

        Args:
          embeds: float[B, T, D], token embeddings or anything in their place.
          positions: int32[B, T], counted over real tokens; -1 at padding.
          mask: bool, broadcastable to [B, 1, T, T]: who sees whom among these.
          cache: keys and values of what stands before them; all see its prompt.
          ancestor_mask: bool[B, 1, T, S], which of the cached generated tokens each sees.
          return_kv: whether to return keys and values.
          key: randomness for dropout, or None.

        Returns:
          float[B, T, D] after the final norm; and keys and values by layer, or None.
        """
        raise NotImplementedError

    def __call__(
        self, embeds: jax.Array, mask: jax.Array, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Hidden states of whole sequences: float[B, T, D], mask int32[B, T] -> float[B, T, D].

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

    def prefill(self, prompt: jax.Array, mask: jax.Array, slots: int) -> tuple[jax.Array, KVCache]:
        """See `LanguageModel.prefill`."""
        hidden, prompt_kv = self.run(prompt, _positions(mask), _causal(mask), return_kv=True)
        generated = self.empty_cache(len(prompt), slots, hidden.dtype)
        return self.logits(hidden[:, -1:])[:, 0], KVCache(prompt_kv, mask > 0, generated)

    def decode_step(
        self, ids: jax.Array, cache: KVCache, ancestor_mask: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """See `LanguageModel.decode_step`."""
        width = ids.shape[1]
        length = cache.prompt_mask.sum(axis=1, dtype=jnp.int32)
        positions = jnp.broadcast_to((length + step)[:, None], ids.shape)
        hidden, new = self.run(
            self.embed(ids),
            positions,
            new_token_mask(width),
            cache,
            ancestor_mask[:, None],
            return_kv=True,
        )
        generated = update_cache(cache.generated, new, step * width)
        return self.logits(hidden), cache._replace(generated=generated)


def _positions(mask: jax.Array) -> jax.Array:
    """int32[B, T]: 0, 1, 2, ... over real tokens, -1 at padding."""
    return jnp.where(mask > 0, jnp.cumsum(mask, axis=1) - 1, -1)


def _causal(mask: jax.Array) -> jax.Array:
    """bool[B, 1, T, T]: each token sees itself and the earlier ones that are not padding."""
    length = mask.shape[1]
    return causal_mask(length, length) & (mask > 0)[:, None, None]
