"""T5 v1.1 and FlanT5 (Raffel et al. 2020; Chung et al. 2022): an encoder-decoder language model.

RMSNorm before each part, no biases, no scaling of attention scores, relative positions as a bias
on the scores that all layers of a side share, gated feed-forwards, and an output head of its own.
Inside BLIP-2 the feed-forward's activation is the exact GELU, not FlanT5's tanh one: LAVIS
overrides it and the published checkpoints' configs say so.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blip2_jax.models.layers import (
    Attention,
    GatedMLP,
    Stack,
    causal_mask,
    dropout,
    linear,
    normal,
    rms_norm,
    split_key,
    update_cache,
)

Cache = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1; the defaults are FlanT5-XL's, as BLIP-2 uses it."""

    vocab_size: int = 32128
    hidden_size: int = 2048
    num_layers: int = 24
    num_decoder_layers: int = 24
    num_heads: int = 32
    head_dim: int = 64
    mlp_dim: int = 5120
    activation: str = "gelu"
    relative_buckets: int = 32
    relative_max_distance: int = 128
    rms_norm_eps: float = 1e-6
    tied_head: bool = False
    scale_logits: bool = False  # by hidden_size ** -0.5: only the original T5, with its tied head
    dropout: float = 0.1
    decoder_start_id: int = 0
    remat: str = "none"


def relative_buckets(
    num_queries: int, num_keys: int, *, both_ways: bool, buckets: int, max_distance: int
) -> np.ndarray:
    """Which bucket the distance of each key from each query falls into: int32[T, S].

    Half of the buckets (of each direction, where both are seen) are exact distances, the others
    grow logarithmically up to `max_distance`. Made by numpy at trace time: an accelerator's
    logarithm can be off by one bucket at 16, 32 and 64.
    """
    distance = np.arange(num_keys)[None, :] - np.arange(num_queries)[:, None]
    first = np.zeros_like(distance)
    if both_ways:
        buckets //= 2
        first = buckets * (distance > 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = buckets // 2
    grown = np.log(np.maximum(distance, 1) / exact) / math.log(max_distance / exact)
    far = np.minimum(exact + (grown * (buckets - exact)).astype(np.int64), buckets - 1)
    return (first + np.where(distance < exact, distance, far)).astype(np.int32)


class T5Block(nnx.Module):
    """One layer of either side; `decoder` adds the attention to the encoder's output."""

    def __init__(self, config: T5Config, decoder: bool, *, dtype: Any = None, rngs: nnx.Rngs):
        width = config.hidden_size
        norm = lambda: rms_norm(width, eps=config.rms_norm_eps, dtype=dtype, rngs=rngs)  # noqa: E731
        attention = lambda: Attention(  # noqa: E731
            width,
            config.num_heads,
            head_dim=config.head_dim,
            bias="",
            scale=1.0,
            dropout_rate=config.dropout,
            dtype=dtype,
            rngs=rngs,
        )
        self.self_attn_norm, self.self_attn = norm(), attention()
        if decoder:
            self.cross_attn_norm, self.cross_attn = norm(), attention()
        self.mlp_norm = norm()
        self.mlp = GatedMLP(
            width, config.mlp_dim, activation=config.activation, dtype=dtype, rngs=rngs
        )
        self.dropout = config.dropout

    def attend_self(self, x, mask, bias, cache: Cache | None, offset, key):
        """Self-attention on the stream; returns it and the updated cache."""
        k1, k2 = split_key(key, 2)
        h = self.self_attn_norm(x)
        keys_values = self.self_attn.keys_values(h)
        if cache is not None:
            keys_values = cache = update_cache(cache, keys_values, offset)
        out = self.self_attn(h, keys_values, mask=mask, bias=bias, key=k1)
        return x + dropout(out, self.dropout, k2), cache

    def attend_encoder(self, x, keys_values: Cache, mask, key):
        """Attention to the encoder's output; relative positions have no meaning there."""
        k1, k2 = split_key(key, 2)
        out = self.cross_attn(self.cross_attn_norm(x), keys_values, mask=mask, key=k1)
        return x + dropout(out, self.dropout, k2)

    def feed_forward(self, x, key):
        return x + dropout(self.mlp(self.mlp_norm(x)), self.dropout, key)


class T5(nnx.Module):
    """The language model: embeddings into the encoder, token ids into the decoder, logits out."""

    def __init__(self, config: T5Config, *, dtype: Any = None, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        width = config.hidden_size
        embed = lambda rows, d: nnx.Embed(  # noqa: E731
            rows, d, embedding_init=normal(0.02), dtype=dtype, rngs=rngs
        )
        norm = lambda: rms_norm(width, eps=config.rms_norm_eps, dtype=dtype, rngs=rngs)  # noqa: E731
        stack = lambda depth, decoder: Stack(  # noqa: E731
            lambda r: T5Block(config, decoder, dtype=dtype, rngs=r),
            depth,
            remat=config.remat,
            rngs=rngs,
        )
        self.embed_tokens = embed(config.vocab_size, width)
        self.encoder_relative_bias = embed(config.relative_buckets, config.num_heads)
        self.encoder, self.encoder_norm = stack(config.num_layers, False), norm()
        self.decoder_relative_bias = embed(config.relative_buckets, config.num_heads)
        self.decoder, self.decoder_norm = stack(config.num_decoder_layers, True), norm()
        if not config.tied_head:
            self.lm_head = linear(width, config.vocab_size, bias=False, dtype=dtype, rngs=rngs)

    def embed(self, ids: jax.Array) -> jax.Array:
        """Token embeddings of either side: int32[B, T] -> float[B, T, D]."""
        return self.embed_tokens(ids)

    def _bias(self, table: nnx.Embed, num_queries: int, num_keys: int, both_ways: bool):
        """Relative positions' part of the scores: float32[H, T, S]."""
        c = self.config
        buckets = relative_buckets(
            num_queries,
            num_keys,
            both_ways=both_ways,
            buckets=c.relative_buckets,
            max_distance=c.relative_max_distance,
        )
        return table.embedding[...].astype(jnp.float32)[buckets].transpose(2, 0, 1)

    def encode(
        self, embeds: jax.Array, mask: jax.Array, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Runs the encoder: float[B, S, D] under mask int32[B, S] -> float[B, S, D]."""
        k_embed, k_layers, k_out = split_key(key, 3)
        length = embeds.shape[1]
        bias = self._bias(self.encoder_relative_bias, length, length, both_ways=True)[None]
        seen = (mask > 0)[:, None, None]

        def step(block, x, layer):
            k1, k2 = split_key(layer[1], 2)
            x, _ = block.attend_self(x, seen, bias, None, 0, k1)
            return block.feed_forward(x, k2), None

        x = dropout(embeds, self.config.dropout, k_embed)
        x, _ = self.encoder(step, x, key=k_layers)
        return dropout(self.encoder_norm(x), self.config.dropout, k_out)

    def encoder_keys_values(self, encoded: jax.Array) -> Cache:
        """What the decoder's layers read of the encoder's output: two of float[L, B, H, S, K]."""
        graph, params = nnx.split(self.decoder.blocks.cross_attn)
        return jax.vmap(lambda p: nnx.merge(graph, p).keys_values(encoded))(params)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache of the decoder's own keys and values, two of float[L, B, H, S, K]."""
        c = self.config
        shape = (c.num_decoder_layers, batch, c.num_heads, length, c.head_dim)
        return jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)

    def decode(
        self,
        embeds: jax.Array,
        mask: jax.Array,
        encoder_kv: Cache,
        encoder_mask: jax.Array,
        *,
        cache: Cache | None = None,
        offset: int | jax.Array = 0,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the decoder.

        Args:
          embeds: float[B, T, D], embedded target tokens, shifted right by the caller.
          mask: int32[B, S], 1 at real positions, over all keys (S = T without a cache).
          encoder_kv, encoder_mask: see `encoder_keys_values`; int32[B, S_encoder].
          cache, offset: as in `opt.OPT.__call__`.
          key: randomness for dropout, or None.

        Returns:
          float[B, T, D] after the final norm, and the updated cache.
        """
        k_embed, k_layers, k_out = split_key(key, 3)
        length, total = embeds.shape[1], mask.shape[1]
        bias = self._bias(self.decoder_relative_bias, total, total, both_ways=False)
        bias = jax.lax.dynamic_slice_in_dim(bias, offset, length, axis=1)[None]
        seen = causal_mask(length, total, offset)[None, None] & (mask > 0)[:, None, None]
        encoder_seen = (encoder_mask > 0)[:, None, None]

        def step(block, x, layer):
            (encoder_kv, layer_cache), layer_key = layer
            k1, k2, k3 = split_key(layer_key, 3)
            x, layer_cache = block.attend_self(x, seen, bias, layer_cache, offset, k1)
            x = block.attend_encoder(x, encoder_kv, encoder_seen, k2)
            return block.feed_forward(x, k3), layer_cache

        x = dropout(embeds, self.config.dropout, k_embed)
        x, cache = self.decoder(step, x, (encoder_kv, cache), key=k_layers)
        return dropout(self.decoder_norm(x), self.config.dropout, k_out), cache

    def score(
        self,
        prompt: jax.Array,
        prompt_mask: jax.Array,
        ids: jax.Array,
        mask: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Scores of the text that answers a prompt: the encoder reads one, the decoder the other.

        Arguments and result as in `language.DecoderOnly.score`; the text is padded on the right.
        """
        k_encoder, k_decoder = split_key(key, 2)
        encoded = self.encode(prompt, prompt_mask, key=k_encoder)
        start = jnp.full_like(ids[:, :1], self.config.decoder_start_id)
        shifted = jnp.concatenate([start, ids[:, :-1]], axis=1)
        seen = jnp.concatenate([jnp.ones_like(mask[:, :1]), mask[:, :-1]], axis=1)
        hidden, _ = self.decode(
            self.embed(shifted),
            seen,
            self.encoder_keys_values(encoded),
            prompt_mask,
            key=k_decoder,
        )
        return self.logits(hidden)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token scores: float[B, T, D] -> float32[B, T, V]."""
        c = self.config
        table = self.embed_tokens.embedding[...].T if c.tied_head else self.lm_head.kernel[...]
        if c.scale_logits:
            hidden = hidden * c.hidden_size**-0.5
        return jnp.einsum(
            "btd,dv->btv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
