"""OPT, a decoder-only language model (Zhang et al. 2022), as published on the Hugging Face hub.

Pre-norm transformer, ReLU, learned positions with an offset of 2, tied output head. Positions are
counted over the attention mask, so padding on either side changes nothing.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from blip2_jax.models.attention import Attention, KeysValues, MaskedKV
from blip2_jax.models.kv_cache import KVCache, cached_keys_values
from blip2_jax.models.language import DecoderOnly
from blip2_jax.models.layers import (
    MLP,
    Embed,
    Stack,
    dropout,
    layer_norm,
    linear,
    normal,
    split_key,
    vocabulary_logits,
)

LAYER_NORM_EPS = 1e-5  # torch's default; OPT's config has no key for it
POSITION_OFFSET = 2  # the first two rows of the position table are unused, as in fairseq


@dataclasses.dataclass(frozen=True)
class OPTConfig:
    """Sizes of an OPT; the defaults are OPT-2.7B's."""

    family: ClassVar[Literal["opt"]] = "opt"  # traits: see `data.language.LanguageConfig`
    is_encoder_decoder: ClassVar[Literal[False]] = False
    padding_side: ClassVar[str] = "left"
    end_of_text: ClassVar[str] = "\n"  # of BLIP-2's texts (LAVIS `blip2_opt.py`), not its own </s>

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
    scan: bool = True  # see `layers.Stack`
    bias: bool = True  # of attention and feed-forward
    tied_head: bool = True
    bos_token_id: int | None = 2
    eos_token_ids: tuple[int, ...] = ()  # none: `end_of_text`
    pad_token_id: int | None = 1

    @property
    def max_length(self) -> int:
        """The longest sequence that can be read, in tokens."""
        return self.max_position_embeddings


def _norm(width: int, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return layer_norm(width, eps=LAYER_NORM_EPS, dtype=dtype, rngs=rngs)


class OPTBlock(nnx.Module):
    """Self-attention and a feed-forward, each after its LayerNorm, with residuals."""

    def __init__(self, config: OPTConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        width = config.hidden_size
        self.self_attn_layer_norm = _norm(width, dtype, rngs)
        self.self_attn = Attention(
            width,
            config.num_heads,
            bias="qkvo" if config.bias else "",
            dtype=dtype,
            rngs=rngs,
        )
        self.final_layer_norm = _norm(width, dtype, rngs)
        self.mlp = MLP(
            width,
            config.ffn_dim,
            activation=config.activation,
            bias=config.bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.dropout = config.dropout

    def __call__(
        self, x: jax.Array, mask: jax.Array, past: Sequence[MaskedKV], key: jax.Array | None
    ) -> tuple[jax.Array, KeysValues]:
        """The new residual stream, and this block's keys and values of x."""
        k1, k2 = split_key(key, 2)
        h = self.self_attn_layer_norm(x)
        keys_values = self.self_attn.keys_values(h)
        x = x + dropout(self.self_attn(h, keys_values, mask=mask, past=past), self.dropout, k1)
        x = x + dropout(self.mlp(self.final_layer_norm(x)), self.dropout, k2)
        return x, keys_values


def _sinusoids(amplitude: float) -> Callable[..., jax.Array]:
    """An initializer: sines and cosines of position (Vaswani et al. 2017, section 3.5)."""

    def init(
        key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32, **_: Any
    ) -> jax.Array:
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
        self.config = config

        def embed(num: int, init: Callable[..., jax.Array]) -> Embed:
            width = config.hidden_size
            return Embed(num, width, embedding_init=init, dtype=dtype, rngs=rngs)

        self.embed_tokens = embed(config.vocab_size, normal(0.02))
        self.embed_positions = embed(
            config.max_position_embeddings + POSITION_OFFSET,
            _sinusoids(config.sinusoid) if config.sinusoid else normal(0.02),
        )
        self.layers = Stack(
            lambda r: OPTBlock(config, dtype=dtype, rngs=r),
            config.num_layers,
            remat=config.remat,
            scan=config.scan,
            rngs=rngs,
        )
        self.final_layer_norm = _norm(config.hidden_size, dtype, rngs)
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
        shape = (batch, c.num_heads, slots, c.hidden_size // c.num_heads)
        return self.layers.empty_cache(shape, dtype)

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
        """See `DecoderOnly.run`."""

        def step(block: OPTBlock, x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            past, key = layer
            x, keys_values = block(x, mask, cached_keys_values(past, cache, ancestor_mask), key)
            return x, keys_values if return_kv else None

        past = None if cache is None else self.layers.zip_layers(cache.prompt, cache.generated)
        x = embeds + self.embed_positions(positions + POSITION_OFFSET)
        x, keys_values = self.layers(step, x, past, key=key)
        return self.final_layer_norm(x), keys_values

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token logits: float[B, T, D] -> float32[B, T, V]."""
        table = (
            self.embed_tokens.embedding[...].T
            if self.config.tied_head
            else self.lm_head.kernel[...]
        )
        return vocabulary_logits(hidden, table)
