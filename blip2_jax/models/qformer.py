"""The Querying Transformer (paper, section 3.1): a BERT whose learned queries read an image.

Queries and text share self-attention; every `cross_attention_frequency`-th layer lets the queries
(never the text) attend to the image; queries and text have feed-forwards of their own. One module
serves all objectives; which inputs are given and the mask decide what attends to what:

    uni-modal (ITC)          bi-directional (ITM)       multi-modal causal (ITG)
           q q t t                  q q t t                    q q t t
        q  x x . .               q  x x x x                 q  x x . .
        q  x x . .               q  x x x x                 q  x x . .
        t  . . x x               t  x x x x                 t  x x x .
        t  . . x x               t  x x x x                 t  x x x x

Uni-modal is two calls, one with queries and one with text. Multi-modal causal is a call with text
alone on top of the keys and values of the queries' own pass: since queries never see text
there, it computes the same as a call with both.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from blip2_jax.models import layers
from blip2_jax.models.attention import Attention, KeysValues, causal_mask
from blip2_jax.models.layers import (
    ACTIVATIONS,
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

AXES = (
    *layers.AXES,
    (r"itg_head/dense/kernel$", ("embed", None)),
    (r"itg_head/(dense/)?bias$", (None,)),
)


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """Sizes of a Q-Former; the defaults are the paper's: BERT-base and 32 queries."""

    num_query_tokens: int = 32
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    cross_attention_frequency: int = 2
    encoder_width: int = 1408
    vocab_size: int = 30523  # bert-base-uncased and [DEC]
    bos_token_id: int = 30522  # [DEC], which begins the text of ITG
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    initializer_range: float = 0.02  # standard deviation of fresh weights, BERT's; suits 768
    remat: str = "none"


def _norm(config: QFormerConfig, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return layer_norm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype, rngs=rngs)


class Residual(nnx.Module):
    """BERT's post-norm: LayerNorm(x + Dropout(f(x))) around a feed-forward."""

    def __init__(self, config: QFormerConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        self.mlp = MLP(
            config.hidden_size,
            config.mlp_dim,
            activation="gelu",
            std=config.initializer_range,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = _norm(config, dtype, rngs)
        self.dropout = config.dropout

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """float[B, T, D] -> float[B, T, D]; `key` is randomness of dropout, or None."""
        return self.norm(x + dropout(self.mlp(x), self.dropout, key))


class ResidualAttention(nnx.Module):
    """BERT's post-norm around an attention; `kv_width` makes it a cross-attention."""

    def __init__(
        self,
        config: QFormerConfig,
        kv_width: int | None = None,
        *,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        self.attention = Attention(
            config.hidden_size,
            config.num_heads,
            kv_width=kv_width,
            dropout_rate=config.dropout,
            std=config.initializer_range,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = _norm(config, dtype, rngs)
        self.dropout = config.dropout

    def __call__(
        self,
        x: jax.Array,
        keys_values: KeysValues,
        *,
        mask: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Attends from x to given keys and values.

        Args:
          x: float[B, T, D].
          keys_values: two of float[B, H, S, K].
          mask: bool, broadcastable to [B, H, T, S]; None hides nothing.
          key: randomness of dropout, or None.

        Returns:
          float[B, T, D].
        """
        k1, k2 = split_key(key, 2)
        out = self.attention(x, keys_values, mask=mask, key=k1)
        return self.norm(x + dropout(out, self.dropout, k2))


class QFormerLayer(nnx.Module):
    """Self-attention over queries and text, then a feed-forward for each of them."""

    def __init__(self, config: QFormerConfig, text: bool, *, dtype: Any = None, rngs: nnx.Rngs):
        self.attention = ResidualAttention(config, dtype=dtype, rngs=rngs)
        self.mlp_query = Residual(config, dtype=dtype, rngs=rngs)
        if text:
            self.mlp_text = Residual(config, dtype=dtype, rngs=rngs)


class QFormerGroup(nnx.Module):
    """`cross_attention_frequency` layers, the first with a cross-attention; a scan repeats it."""

    def __init__(self, config: QFormerConfig, text: bool, *, dtype: Any = None, rngs: nnx.Rngs):
        self.frequency = config.cross_attention_frequency
        self.layers = jax.vmap(lambda r: QFormerLayer(config, text, dtype=dtype, rngs=r))(
            rngs.split(self.frequency)
        )
        self.crossattention = ResidualAttention(
            config, config.encoder_width, dtype=dtype, rngs=rngs
        )

    def __call__(
        self,
        x: jax.Array,
        num_queries: int,
        image_kv: KeysValues | None,
        mask: jax.Array | None,
        past: KeysValues | None,
        key: jax.Array | None,
        maps: bool,
    ) -> tuple[jax.Array, tuple[KeysValues, jax.Array | None]]:
        """One group.

        Returns:
          The new x; the self-attention keys and values, two of float[f, B, H, Q + T, K]; and
          cross-attention of the queries to the image, float32[B, H, Q, N], or None unless `maps`.
        """
        attention_map = None
        keys = split_key(key, 4 * self.frequency)
        graph, params = nnx.split(self.layers)
        keys_values = []
        for i in range(self.frequency):
            k_self, k_cross, k_query, k_text = keys[4 * i : 4 * i + 4]
            layer = nnx.merge(graph, jax.tree.map(lambda p: p[i], params))  # noqa: B023
            layer_kv = layer.attention.attention.keys_values(x)
            keys_values.append(layer_kv)
            if past is not None:
                layer_kv = jax.tree.map(
                    lambda p, new: jnp.concatenate([p[i], new], axis=-2),  # noqa: B023
                    past,
                    layer_kv,
                )
            x = layer.attention(x, layer_kv, mask=mask, key=k_self)
            parts = []
            if num_queries:
                queries = x[:, :num_queries]
                if i == 0 and image_kv is not None:
                    if maps:
                        attention_map = self.crossattention.attention.probabilities(
                            queries, image_kv[0]
                        )
                    queries = self.crossattention(queries, image_kv, key=k_cross)
                parts.append(layer.mlp_query(queries, k_query))
            if x.shape[1] > num_queries:
                parts.append(layer.mlp_text(x[:, num_queries:], k_text))
            x = jnp.concatenate(parts, axis=1)
        return x, (jax.tree.map(lambda *kv: jnp.stack(kv), *keys_values), attention_map)


class QFormer(nnx.Module):
    """The transformer. `text=False` is the stage-2 form, which has no text branch at all."""

    def __init__(
        self, config: QFormerConfig, *, text: bool = True, dtype: Any = None, rngs: nnx.Rngs
    ):
        groups, rest = divmod(config.num_layers, config.cross_attention_frequency)
        if rest:
            raise ValueError(
                f"qformer.num_layers {config.num_layers} is not a multiple of "
                f"cross_attention_frequency {config.cross_attention_frequency}: "
                "--config.model.qformer.cross_attention_frequency=1, or another number of layers."
            )
        self.config, self.text = config, text
        if text:
            init = normal(config.initializer_range)
            width, sizes = config.hidden_size, (config.vocab_size, config.max_position_embeddings)
            self.word_embeddings, self.position_embeddings = (
                Embed(num, width, embedding_init=init, dtype=dtype, rngs=rngs) for num in sizes
            )
        self.norm = _norm(config, dtype, rngs)
        self.groups = Stack(
            lambda r: QFormerGroup(config, text, dtype=dtype, rngs=r),
            groups,
            remat=config.remat,
            rngs=rngs,
        )

    def image_keys_values(self, image_embeds: jax.Array) -> KeysValues:
        """Cross-attention keys and values of all layers, to be shared by all passes over an image.

        Args:
          image_embeds: float[B, N, D_image].

        Returns:
          Two of float[groups, B, H, N, K].
        """
        return self.groups.map(lambda g: g.crossattention.attention.keys_values(image_embeds))

    def __call__(
        self,
        queries: jax.Array | None = None,
        text_ids: jax.Array | None = None,
        *,
        image_kv: KeysValues | None = None,
        mask: jax.Array | None = None,
        past: KeysValues | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """One pass.

        Args:
          queries: float[B, Q, D], the query tokens, or None.
          text_ids: int32[B, T], or None. Positions count from 0 whatever stands before the text.
          image_kv: what `image_keys_values` returned; needed with queries.
          mask: bool, broadcastable to [B, 1, Q + T, past + Q + T]; None hides nothing.
          past: keys and values of an earlier pass, two of float[groups, f, B, H, P, K].
          key: randomness for dropout, or None.

        Returns:
          float[B, Q + T, D], and this pass's own self-attention keys and values.
        """
        x, (keys_values, _) = self._run(queries, text_ids, image_kv, mask, past, key)
        return x, keys_values

    def attention_maps(self, queries: jax.Array, image_kv: KeysValues) -> jax.Array:
        """Cross-attention of the queries: float32[groups, B, H, Q, N], each row sums to 1."""
        _, (_, maps) = self._run(queries, None, image_kv, None, None, None, maps=True)
        return maps

    def _run(
        self,
        queries: jax.Array | None,
        text_ids: jax.Array | None,
        image_kv: KeysValues | None,
        mask: jax.Array | None,
        past: KeysValues | None,
        key: jax.Array | None,
        *,
        maps: bool = False,
    ) -> tuple[jax.Array, tuple[KeysValues, jax.Array]]:
        """One pass: hidden states, keys and values, and attention maps (with `maps`)."""
        k_embed, k_layers = split_key(key, 2)
        parts = [] if queries is None else [queries]
        if text_ids is not None:
            positions = self.position_embeddings(jnp.arange(text_ids.shape[1]))
            parts.append(self.word_embeddings(text_ids) + positions)
        x = jnp.concatenate(parts, axis=1)
        x = dropout(self.norm(x), self.config.dropout, k_embed)
        num_queries = 0 if queries is None else queries.shape[1]

        def step(group: QFormerGroup, x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            (image_kv, past), key = layer
            return group(x, num_queries, image_kv, mask, past, key, maps)

        return self.groups(step, x, (image_kv, past), key=k_layers)


class LMHead(nnx.Module):
    """BERT's language-modeling head, with the word embeddings as its output matrix."""

    def __init__(self, config: QFormerConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        width = config.hidden_size
        self.dense = linear(width, width, std=config.initializer_range, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(width, eps=config.layer_norm_eps, dtype=dtype, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,)))

    def __call__(self, hidden: jax.Array, word_embeddings: Embed) -> jax.Array:
        """float[B, T, D] -> float32[B, T, V]."""
        x = self.norm(ACTIVATIONS["gelu"](self.dense(hidden)))
        logits = vocabulary_logits(x, word_embeddings.embedding[...].T)
        return logits + self.bias[...].astype(jnp.float32)


def key_mask(text_mask: jax.Array, num_queries: int = 0) -> jax.Array:
    """bool[B, 1, 1, Q + T]: every query is seen, and every text token that is not padding."""
    seen = jnp.pad(text_mask > 0, ((0, 0), (num_queries, 0)), constant_values=True)
    return seen[:, None, None, :]


def multimodal_causal_mask(text_mask: jax.Array, num_queries: int) -> jax.Array:
    """bool[B, 1, T, Q + T]: text sees every query, and the text up to itself."""
    length = text_mask.shape[1]
    return causal_mask(length, num_queries + length, num_queries) & key_mask(text_mask, num_queries)
