"""OPT, a decoder-only language model (Zhang et al. 2022), as published on the Hugging Face hub.

Pre-norm transformer, ReLU, learned positions with an offset of 2, tied output head. Positions are
counted over the attention mask, so padding on either side changes nothing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from blip2_jax.models.language import DecoderOnly
from blip2_jax.models.layers import (
    MLP,
    Attention,
    Stack,
    causal_mask,
    dropout,
    layer_norm,
    normal,
    split_key,
    update_cache,
)

Cache = tuple[jax.Array, jax.Array]

LAYER_NORM_EPS = 1e-5  # torch's default; OPT's config has no key for it
POSITION_OFFSET = 2  # the first two rows of the position table are unused (fairseq's heritage)


@dataclasses.dataclass(frozen=True)
class OPTConfig:
    """Sizes of an OPT; the defaults are OPT-2.7B's."""

    vocab_size: int = 50272
    hidden_size: int = 2560
    num_layers: int = 32
    num_heads: int = 32
    ffn_dim: int = 10240
    max_position_embeddings: int = 2048
    activation: str = "relu"
    dropout: float = 0.1
    # Amplitude of sinusoids that the position table starts from; 0: N(0, 0.02), as published. A
    # small model learns with them, within hundreds of steps, to attend to the token before.
    sinusoid: float = 0.0
    remat: str = "none"


class OPTBlock(nnx.Module):
    """Self-attention and a feed-forward, each after its LayerNorm, each added to the stream."""

    def __init__(self, config: OPTConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        width = config.hidden_size
        norm = lambda: layer_norm(width, eps=LAYER_NORM_EPS, dtype=dtype, rngs=rngs)  # noqa: E731
        self.self_attn_layer_norm = norm()
        self.self_attn = Attention(width, config.num_heads, dtype=dtype, rngs=rngs)
        self.final_layer_norm = norm()
        self.mlp = MLP(width, config.ffn_dim, activation=config.activation, dtype=dtype, rngs=rngs)
        self.dropout = config.dropout

    def __call__(
        self, x: jax.Array, mask: jax.Array, cache: Cache | None, offset, key
    ) -> tuple[jax.Array, Cache | None]:
        k1, k2 = split_key(key, 2)
        h = self.self_attn_layer_norm(x)
        keys_values = self.self_attn.keys_values(h)
        if cache is not None:
            keys_values = cache = update_cache(cache, keys_values, offset)
        x = x + dropout(self.self_attn(h, keys_values, mask=mask), self.dropout, k1)
        x = x + dropout(self.mlp(self.final_layer_norm(x)), self.dropout, k2)
        return x, cache


def _sinusoids(amplitude: float):
    """An initializer: sines and cosines of position (Vaswani et al. 2017, section 3.5)."""

    def init(key, shape, dtype=jnp.float32, **_):
        del key
        positions, width = shape
        rates = 10000.0 ** (-jnp.arange(0, width, 2) / width)
        angles = jnp.arange(positions)[:, None] * rates
        table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
        return (amplitude * table).astype(dtype)

    return init


class OPT(DecoderOnly):
    """The language model: embeddings in, hidden states or logits out."""

    def __init__(self, config: OPTConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        embed = lambda rows, init: nnx.Embed(  # noqa: E731
            rows, config.hidden_size, embedding_init=init, dtype=dtype, rngs=rngs
        )
        self.embed_tokens = embed(config.vocab_size, normal(0.02))
        self.embed_positions = embed(
            config.max_position_embeddings + POSITION_OFFSET,
            _sinusoids(config.sinusoid) if config.sinusoid else normal(0.02),
        )
        self.layers = Stack(
            lambda r: OPTBlock(config, dtype=dtype, rngs=r),
            config.num_layers,
            remat=config.remat,
            rngs=rngs,
        )
        self.final_layer_norm = layer_norm(
            config.hidden_size, eps=LAYER_NORM_EPS, dtype=dtype, rngs=rngs
        )

    def embed(self, ids: jax.Array) -> jax.Array:
        """Token embeddings: int32[B, T] -> float[B, T, D]."""
        return self.embed_tokens(ids)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache of keys and values, two of float[L, B, H, S, K]."""
        c = self.config
        shape = (c.num_layers, batch, c.num_heads, length, c.hidden_size // c.num_heads)
        return jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)

    def __call__(
        self,
        embeds: jax.Array,
        mask: jax.Array,
        *,
        cache: Cache | None = None,
        offset: int | jax.Array = 0,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the decoder.

        Args:
          embeds: float[B, T, D], token embeddings or anything in their place.
          mask: int32[B, S], 1 for real and 0 for padding positions, over all keys: S = T
            without a cache, the cache's length with one.
          cache: keys and values of earlier positions, or None.
          offset: where in the cache the T positions stand.
          key: randomness for dropout, or None.

        Returns:
          float[B, T, D] after the final norm, and the updated cache.
        """
        length = embeds.shape[1]
        positions = jnp.cumsum(mask, axis=1) * mask - 1 + POSITION_OFFSET
        positions = jax.lax.dynamic_slice_in_dim(positions, offset, length, axis=1)
        x = embeds + self.embed_positions(positions)
        seen = causal_mask(length, mask.shape[1], offset)[None, None] & (mask > 0)[:, None, None]

        def step(block, x, layer):
            layer_cache, layer_key = layer
            return block(x, seen, layer_cache, offset, layer_key)

        x, cache = self.layers(step, x, cache, key=key)
        return self.final_layer_norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token scores through the tied head: float[B, T, D] -> float32[B, T, V]."""
        return jnp.einsum(
            "btd,vd->btv",
            hidden,
            self.embed_tokens.embedding[...].astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )


class LanguageModel(nnx.Module):
    """An LLM alone, under the name it has inside BLIP-2: for pre-training it."""

    def __init__(self, config: OPTConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        self.llm = OPT(config, dtype=dtype, rngs=rngs)
