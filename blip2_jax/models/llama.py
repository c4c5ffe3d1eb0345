"""The Llama family (Touvron et al. 2023): Vicuna for InstructBLIP, and today's open LLMs.

Pre-norm transformer with RMSNorm, rotary positions, grouped-query attention and a gated SiLU
feed-forward.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blip2_jax.models.attention import Attention, KeysValues, MaskedKV
from blip2_jax.models.kv_cache import KVCache, cached_keys_values
from blip2_jax.models.language import DecoderOnly
from blip2_jax.models.layers import (
    Embed,
    GatedMLP,
    Stack,
    linear,
    normal,
    rms_norm,
    vocabulary_logits,
)

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (Su et al. 2021) and how they are stretched beyond the trained length.

    Attributes:
      theta: base of the frequencies.
      kind: "default"; "linear" divides all frequencies by `factor`; "dynamic" would change them for
        texts beyond the longest, which are not read; "llama3" divides only those whose wavelength
        is long against `original_length`, with a smooth transition (Llama 3.1); "yarn" does so
        by channel (Peng et al. 2023); "longrope" divides each by its own number (Ding et al. 2024).
      factor: how much longer texts may be.
      low_freq_factor, high_freq_factor: turns within `original_length` at the two ends of the
        transition; YaRN calls them beta_slow and beta_fast.
      original_length: the trained length.
      truncate: whether YaRN's transition begins and ends at whole channels.
      divisors: longrope's, for texts up to `original_length`; there are none longer.
      long_divisors: longrope's for longer ones; kept for writing.
      magnitude: factor on queries and keys.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192
    truncate: bool = True
    divisors: tuple[float, ...] = ()
    long_divisors: tuple[float, ...] = ()
    magnitude: float = 1.0


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama; the defaults are those of 7B and of Vicuna-7B."""

    family: ClassVar[Literal["llama"]] = "llama"  # traits: see `data.language.LanguageConfig`
    is_encoder_decoder: ClassVar[Literal[False]] = False
    padding_side: ClassVar[str] = "left"
    end_of_text: ClassVar[str] = ""  # ends in its own end token

    vocab_size: int = 32000
    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    mlp_dim: int = 11008
    activation: str = "silu"
    rms_norm_eps: float = 1e-6
    tied_head: bool = False
    rope: RopeConfig = RopeConfig()
    remat: str = "none"
    scan: bool = True  # see `layers.Stack`
    max_position_embeddings: int = 2048
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int | None = None

    @property
    def max_length(self) -> int | None:
        """The longest sequence that can be read, in tokens; None: any."""
        return self.max_position_embeddings if self.rope.kind in ("dynamic", "longrope") else None


def frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Angle per position of each pair of channels: float32[K / 2]."""
    rates = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        rates = rates / rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_length * rates / (2 * math.pi)  # within the trained length
        low, high = rope.low_freq_factor, rope.high_freq_factor
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        rates = (1 - smooth) * rates / rope.factor + smooth * rates
    elif rope.kind == "yarn":
        # The channels that make so many turns within the trained length.
        first, last = (
            head_dim
            * math.log(rope.original_length / (turns * 2 * math.pi))
            / (2 * math.log(rope.theta))
            for turns in (rope.high_freq_factor, rope.low_freq_factor)
        )
        if rope.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        last += 1e-3 if first == last else 0
        stretched = np.clip((np.arange(head_dim // 2) - first) / (last - first), 0.0, 1.0)
        rates = stretched * rates / rope.factor + (1 - stretched) * rates
    elif rope.kind == "longrope":
        rates = rates / np.array(rope.divisors)
    elif rope.kind not in ROPE_KINDS:
        raise ValueError(f"Rotary scaling {rope.kind!r}; known: {', '.join(ROPE_KINDS)}.")
    return rates.astype(np.float32)


def rotate(
    x: jax.Array, positions: jax.Array, rates: np.ndarray, magnitude: float = 1.0
) -> jax.Array:
    """Rotates each pair of channels (i, i + K / 2) by position times rate.

    Args:
      x: float[B, H, T, K], queries or keys.
      positions: int32[B, T].
      rates: see `frequencies`.
      magnitude: factor on the result.
    """
    angles = positions[:, None, :, None].astype(jnp.float32) * rates
    cos, sin = magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class LlamaBlock(nnx.Module):
    """Self-attention and a gated feed-forward, each after its RMSNorm, with residuals."""

    def __init__(self, config: LlamaConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_norm = rms_norm(width, eps=eps, dtype=dtype, rngs=rngs)
        self.self_attn = Attention(
            width,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            bias="",
            dtype=dtype,
            rngs=rngs,
        )
        self.post_attention_norm = rms_norm(width, eps=eps, dtype=dtype, rngs=rngs)
        self.mlp = GatedMLP(
            width, config.mlp_dim, activation=config.activation, dtype=dtype, rngs=rngs
        )

    def __call__(
        self,
        x: jax.Array,
        rotary: Callable[[jax.Array], jax.Array],
        mask: jax.Array,
        past: Sequence[MaskedKV],
    ) -> tuple[jax.Array, KeysValues]:
        """The new residual stream, and this block's keys (rotated by position) and values."""
        h = self.input_norm(x)
        k, v = self.self_attn.keys_values(h)
        keys_values = (rotary(k), v)
        queries = rotary(self.self_attn.queries(h))
        x = x + self.self_attn(h, keys_values, queries=queries, mask=mask, past=past)
        return x + self.mlp(self.post_attention_norm(x)), keys_values


class Llama(DecoderOnly):
    """The language model: embeddings in, hidden states or logits out."""

    def __init__(self, config: LlamaConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=normal(0.02),
            dtype=dtype,
            rngs=rngs,
        )
        self.layers = Stack(
            lambda r: LlamaBlock(config, dtype=dtype, rngs=r),
            config.num_layers,
            remat=config.remat,
            scan=config.scan,
            rngs=rngs,
        )
        self.norm = rms_norm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, rngs=rngs)
        if not config.tied_head:
            self.lm_head = linear(
                config.hidden_size, config.vocab_size, bias=False, dtype=dtype, rngs=rngs
            )

    def embed(self, ids: jax.Array) -> jax.Array:
        """Token embeddings: int32[B, T] -> float[B, T, D]."""
        return self.embed_tokens(ids)

    def empty_cache(self, batch: int, slots: int, dtype: Any) -> Any:
        """See `DecoderOnly.empty_cache`."""
        c = self.config
        return self.layers.empty_cache((batch, c.num_kv_heads, slots, c.head_dim), dtype)

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
        """See `DecoderOnly.run`. There is no dropout: `key` is taken for the interface's sake."""
        del key
        rates = frequencies(self.config.rope, self.config.head_dim)
        positions = jnp.maximum(positions, 0)

        def rotary(x: jax.Array) -> jax.Array:
            return rotate(x, positions, rates, self.config.rope.magnitude)

        def step(block: LlamaBlock, x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            x, keys_values = block(
                x, rotary, mask, cached_keys_values(layer[0], cache, ancestor_mask)
            )
            return x, keys_values if return_kv else None

        past = None if cache is None else self.layers.zip_layers(cache.prompt, cache.generated)
        x, keys_values = self.layers(step, embeds, past)
        return self.norm(x), keys_values

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token logits: float[B, T, D] -> float32[B, T, V]."""
        table = (
            self.embed_tokens.embedding[...].T
            if self.config.tied_head
            else self.lm_head.kernel[...]
        )
        return vocabulary_logits(hidden, table)
