"""T5 v1.1 and FlanT5 (Raffel et al. 2020; Chung et al. 2022): an encoder-decoder language model.

RMSNorm before each part, no biases, no scaling of attention scores, relative positions as a bias
on the scores that all layers of a side share, gated feed-forwards, and an output head of its own.
Inside BLIP-2 the feed-forward's activation is the exact GELU, not FlanT5's tanh one: LAVIS
overrides it and the published checkpoints' configs say so.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blip2_jax.models.attention import Attention, KeysValues, MaskedKV, causal_mask
from blip2_jax.models.kv_cache import KVCache, new_token_mask, update_cache
from blip2_jax.models.layers import (
    Embed,
    GatedMLP,
    Stack,
    dropout,
    linear,
    normal,
    rms_norm,
    split_key,
    vocabulary_logits,
)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1; the defaults are FlanT5-XL's, as BLIP-2 uses it."""

    family: ClassVar[Literal["t5"]] = "t5"  # traits: see `data.language.LanguageConfig`
    is_encoder_decoder: ClassVar[Literal[True]] = True
    padding_side: ClassVar[str] = "right"
    end_of_text: ClassVar[str] = ""  # ends in its own end token
    bos_token_id: ClassVar[None] = None
    max_length: ClassVar[None] = None  # relative positions are unbounded

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
    scan: bool = True  # see `layers.Stack`
    eos_token_ids: tuple[int, ...] = (1,)
    pad_token_id: int | None = 0


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

        def norm() -> nnx.RMSNorm:
            return rms_norm(width, eps=config.rms_norm_eps, dtype=dtype, rngs=rngs)

        def attention() -> Attention:
            return Attention(
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
            width,
            config.mlp_dim,
            activation=config.activation,
            dropout_rate=config.dropout,
            dtype=dtype,
            rngs=rngs,
        )
        self.dropout = config.dropout

    def attend_self(
        self,
        x: jax.Array,
        mask: jax.Array,
        bias: jax.Array,
        past: Sequence[MaskedKV],
        key: jax.Array | None,
    ) -> tuple[jax.Array, KeysValues]:
        """Self-attention; returns the residual stream, and this block's keys and values of x."""
        k1, k2 = split_key(key, 2)
        h = self.self_attn_norm(x)
        keys_values = self.self_attn.keys_values(h)
        out = self.self_attn(h, keys_values, mask=mask, bias=bias, past=past, key=k1)
        return x + dropout(out, self.dropout, k2), keys_values

    def attend_encoder(
        self, x: jax.Array, keys_values: KeysValues, mask: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """Attention to the encoder's output; relative positions have no meaning there."""
        k1, k2 = split_key(key, 2)
        out = self.cross_attn(self.cross_attn_norm(x), keys_values, mask=mask, key=k1)
        return x + dropout(out, self.dropout, k2)

    def feed_forward(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """The feed-forward after its norm, with a residual: float[B, T, D] -> float[B, T, D]."""
        k1, k2 = split_key(key, 2)
        return x + dropout(self.mlp(self.mlp_norm(x), k1), self.dropout, k2)


class T5(nnx.Module):
    """The language model: embeddings into the encoder, token ids into the decoder, logits out."""

    def __init__(self, config: T5Config, *, dtype: Any = None, rngs: nnx.Rngs):
        self.config = config
        width = config.hidden_size

        def embed(num: int, width: int) -> Embed:
            return Embed(num, width, embedding_init=normal(0.02), dtype=dtype, rngs=rngs)

        def norm() -> nnx.RMSNorm:
            return rms_norm(width, eps=config.rms_norm_eps, dtype=dtype, rngs=rngs)

        def stack(depth: int, decoder: bool) -> Stack[T5Block]:
            return Stack(
                lambda r: T5Block(config, decoder, dtype=dtype, rngs=r),
                depth,
                remat=config.remat,
                scan=config.scan,
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

    def _bias(self, table: Embed, num_queries: int, num_keys: int, both_ways: bool) -> jax.Array:
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
        key_mask = (mask > 0)[:, None, None]

        def step(block: T5Block, x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            k1, k2 = split_key(layer[1], 2)
            x, _ = block.attend_self(x, key_mask, bias, (), k1)
            return block.feed_forward(x, k2), None

        x = dropout(embeds, self.config.dropout, k_embed)
        x, _ = self.encoder(step, x, key=k_layers)
        return dropout(self.encoder_norm(x), self.config.dropout, k_out)

    def encoder_keys_values(self, encoded: jax.Array) -> Any:
        """What the decoder's layers read of the encoder's output, by layer."""
        return self.decoder.map(lambda block: block.cross_attn.keys_values(encoded))

    def decode(
        self,
        ids: jax.Array,
        mask: jax.Array,
        bias: jax.Array,
        encoder_kv: Any,
        encoder_mask: jax.Array,
        *,
        cached: Any = None,
        cached_mask_and_bias: tuple[jax.Array, jax.Array] | None = None,
        return_kv: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Runs the decoder.

        Args:
          ids: int32[B, T], target tokens, shifted right by the caller.
          mask, bias: broadcastable to [B, H, T, T]: who sees whom among these, and how far off.
          encoder_kv, encoder_mask: see `encoder_keys_values`; int32[B, S_encoder].
          cached: keys and values of the tokens before these, by layer, or None.
          cached_mask_and_bias: of those, broadcastable to [B, H, T, S].
          return_kv: whether to return keys and values.
          key: randomness for dropout, or None.

        Returns:
          float[B, T, D] after the final norm; and keys and values by layer, or None.
        """
        k_embed, k_layers, k_out = split_key(key, 3)
        encoder_key_mask = (encoder_mask > 0)[:, None, None]

        def step(block: T5Block, x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            (encoder_kv, *cached), layer_key = layer
            k1, k2, k3 = split_key(layer_key, 3)
            past = [MaskedKV(k, v, *(cached_mask_and_bias or (None, None))) for k, v in cached]
            x, keys_values = block.attend_self(x, mask, bias, past, k1)
            x = block.attend_encoder(x, encoder_kv, encoder_key_mask, k2)
            return block.feed_forward(x, k3), keys_values if return_kv else None

        x = dropout(self.embed(ids), self.config.dropout, k_embed)
        layers = self.decoder.zip_layers(encoder_kv, *([] if cached is None else [cached]))
        x, keys_values = self.decoder(step, x, layers, key=k_layers)
        return dropout(self.decoder_norm(x), self.config.dropout, k_out), keys_values

    def score(
        self,
        prompt: jax.Array,
        prompt_mask: jax.Array,
        ids: jax.Array,
        mask: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """See `LanguageModel.score`: the encoder reads the prompt, the decoder the text."""
        k_encoder, k_decoder = split_key(key, 2)
        encoded = self.encode(prompt, prompt_mask, key=k_encoder)
        start = jnp.full_like(ids[:, :1], self.config.decoder_start_id)
        shifted = jnp.concatenate([start, ids[:, :-1]], axis=1)
        real = jnp.concatenate([jnp.ones_like(mask[:, :1]), mask[:, :-1]], axis=1)
        length = ids.shape[1]
        hidden, _ = self.decode(
            shifted,
            causal_mask(length, length) & (real > 0)[:, None, None],
            self._bias(self.decoder_relative_bias, length, length, both_ways=False),
            self.encoder_keys_values(encoded),
            prompt_mask,
            key=k_decoder,
        )
        return self.logits(hidden)

    def prefill(self, prompt: jax.Array, mask: jax.Array, slots: int) -> tuple[jax.Array, KVCache]:
        """See `LanguageModel.prefill`. The start token's keys and values stand before the slots."""
        encoder_kv = self.encoder_keys_values(self.encode(prompt, mask))
        ids = jnp.full((len(prompt), 1), self.config.decoder_start_id, jnp.int32)
        bias = self._bias(self.decoder_relative_bias, 1, 1, both_ways=False)
        hidden, new = self.decode(ids, new_token_mask(1), bias, encoder_kv, mask, return_kv=True)
        shape = (len(prompt), self.config.num_heads, 1 + slots, self.config.head_dim)
        generated = update_cache(self.decoder.empty_cache(shape, hidden.dtype), new, 0)
        return self.logits(hidden)[:, 0], KVCache(encoder_kv, mask > 0, generated)

    def decode_step(
        self, ids: jax.Array, cache: KVCache, ancestor_mask: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """See `LanguageModel.decode_step`."""
        width, slots = ids.shape[1], ancestor_mask.shape[-1]
        steps = slots // width
        # The step that each slot belongs to: the start token's first, then W slots a step.
        slot_step = np.concatenate([[-1], np.repeat(np.arange(steps), width)])
        bias = self._bias(self.decoder_relative_bias, steps + 1, steps + 1, both_ways=False)
        by_distance = bias[:, -1, ::-1]  # float32[H, steps + 1]
        bias = by_distance[:, jnp.clip(step - slot_step, 0, steps)][None, :, None]
        mask = jnp.pad(ancestor_mask, ((0, 0), (0, 0), (1, 0)), constant_values=True)[:, None]
        hidden, new = self.decode(
            ids,
            new_token_mask(width),
            by_distance[None, :, :1, None],
            cache.prompt,
            cache.prompt_mask,
            cached=cache.generated,
            cached_mask_and_bias=(mask, bias),
            return_kv=True,
        )
        generated = update_cache(cache.generated, new, 1 + step * width)
        return self.logits(hidden), cache._replace(generated=generated)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token logits: float[B, T, D] -> float32[B, T, V]."""
        c = self.config
        table = self.embed_tokens.embedding[...].T if c.tied_head else self.lm_head.kernel[...]
        if c.scale_logits:
            hidden = hidden * c.hidden_size**-0.5
        return vocabulary_logits(hidden, table)
