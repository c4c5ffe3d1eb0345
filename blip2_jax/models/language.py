"""What the decoder-only language models have in common."""

import jax
import jax.numpy as jnp
from flax import nnx


class DecoderOnly(nnx.Module):
    """A language model that reads soft prompts and text in one row (OPT, Llama).

    Subclasses offer `embed`, `init_cache`, `__call__` and `logits` as `opt.OPT` does.
    """

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
          ids, mask: int32[B, T], text with padding on either side.
          key: randomness for dropout, or None.

        Returns:
          float32[B, T, V]: position t holds the scores of token t, given the prompt and the tokens
          before it.
        """
        length = prompt.shape[1]
        embeds = jnp.concatenate([prompt, self.embed(ids).astype(prompt.dtype)], axis=1)
        hidden, _ = self(embeds, jnp.concatenate([prompt_mask, mask], axis=1), key=key)
        return self.logits(hidden[:, length - 1 : -1])
