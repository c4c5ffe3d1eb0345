"""The KV cache of a language model: keys and values of the prompt, and of generated tokens.

W sequences (beams, or samples of one prompt) share their prompt's keys and values. Those of
generated tokens stand in slots: step `s` of all sequences fills the slots from `s * W` on, and an
ancestor mask says which slots a sequence is made of. So no cache is reordered or copied when beams
change places.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from blip2_jax.models.attention import MaskedKV


class KVCache(NamedTuple):
    """Keys and values by layer, as `layers.Stack` has per-layer values: stacked, or a list.

    Attributes:
      prompt: keys and values of the prompt, two of float[L, B, H, P, K]; of an encoder-decoder,
        those that its decoder's cross-attention makes of the encoder's output.
      prompt_mask: bool[B, P].
      generated: keys and values of generated tokens, two of float[L, B, H, S, K].
    """

    prompt: Any
    prompt_mask: jax.Array
    generated: Any


def update_cache(cache: Any, new: Any, offset: int | jax.Array) -> Any:
    """Puts new keys and values, float[..., W, K], into a cache, float[..., S, K], at `offset`."""
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice_in_dim(
            old, new.astype(old.dtype), offset, axis=-2
        ),
        cache,
        new,
    )


def cached_keys_values(
    layer: Any, cache: KVCache | None, ancestor_mask: jax.Array | None
) -> list[MaskedKV]:
    """One layer's part of a cache, as attention reads it.

    Args:
      layer: the layer's keys and values of the prompt, two of float[B, H, P, K], and of generated
        tokens, two of float[B, H, S, K]; None where nothing is cached yet.
      cache: whose part `layer` is.
      ancestor_mask: bool[B, 1, T, S], which of the generated tokens each new token sees.
    """
    if layer is None or cache is None:
        return []
    (prompt_k, prompt_v), (generated_k, generated_v) = layer
    return [
        MaskedKV(prompt_k, prompt_v, cache.prompt_mask[:, None, None]),
        MaskedKV(generated_k, generated_v, ancestor_mask),
    ]


def new_token_mask(width: int) -> jax.Array:
    """bool[1, 1, W, W]: of W new tokens side by side, each sees itself and no other's."""
    return jnp.eye(width, dtype=bool)[None, None]
