"""Softmax attention over new and cached keys and values, its masks, and the projections around it.

Shape words are those of `models.layers`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blip2_jax.models.layers import Linear, dropout, linear

KeysValues = tuple[jax.Array, jax.Array]


class MaskedKV(NamedTuple):
    """Keys and values with what hides and what biases them: cached ones, or a call's own.

    Attributes:
      keys, values: float[B, H, S, K], possibly of fewer heads.
      mask: bool, broadcastable to [B, H, T, S]; False hides a key. None hides nothing.
      bias: float, broadcastable to [B, H, T, S], or None.
    """

    keys: jax.Array
    values: jax.Array
    mask: jax.Array | None
    bias: jax.Array | None = None


def dot_product_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    past: Sequence[MaskedKV] = (),
    scale: float,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention; scores and softmax in float32.

    Args:
      q: float[B, H, T, K].
      k, v: float[B, H, S, K], or with fewer heads, which divide H.
      mask: bool, broadcastable to [B, H, T, S]; False hides a key. A row whose keys are all
        hidden (a padding query) attends to all of them alike: never a NaN.
      bias: float, broadcastable to [B, H, T, S], added to the scores (T5's relative positions).
      past: keys and values in front of these, under the same softmax; they are not copied.
      scale: factor on the scores.
      dropout_rate, key: dropout of the attention probabilities.

    Returns:
      float[B, H, T, K] in q's dtype.
    """
    parts = [*past, MaskedKV(k, v, mask, bias)]
    scores = jnp.concatenate([_scores(q, part, scale) for part in parts], axis=-1)
    probabilities = dropout(jax.nn.softmax(scores, axis=-1), dropout_rate, key)
    ends = np.cumsum([part.keys.shape[-2] for part in parts])
    by_part = jnp.split(probabilities, ends[:-1], axis=-1)
    sums = (_weighted_sum(p, part.values) for p, part in zip(by_part, parts, strict=True))
    return cast(jax.Array, sum(sums))  # there is at least one


def _scores(q: jax.Array, kv: MaskedKV, scale: float) -> jax.Array:
    """float32[B, H, T, S]; heads that share keys are neighbors, and read them without a copy."""
    shape, k = q.shape, kv.keys
    grouped = q.reshape(shape[0], k.shape[1], -1, shape[-1])
    scores = jnp.einsum("bhtk,bhsk->bhts", grouped, k, preferred_element_type=jnp.float32) * scale
    scores = scores.reshape(*shape[:-1], k.shape[-2])
    if kv.bias is not None:
        scores = scores + kv.bias.astype(jnp.float32)
    if kv.mask is not None:
        scores = jnp.where(kv.mask, scores, jnp.finfo(jnp.float32).min)
    return scores


def _weighted_sum(probabilities: jax.Array, v: jax.Array) -> jax.Array:
    """float32[B, H, T, S] and float[B, H, S, K] -> float[B, H, T, K]."""
    shape = probabilities.shape
    grouped = probabilities.astype(v.dtype).reshape(shape[0], v.shape[1], -1, shape[-1])
    out = jnp.einsum("bhts,bhsk->bhtk", grouped, v)
    return out.reshape(*shape[:-1], v.shape[-1])


class Attention(nnx.Module):
    """Multi-head attention with separate q, k, v and output projections.

    Args:
      width: D of the queries and of the output.
      num_heads: H.
      num_kv_heads: heads of keys and values, each shared by H / num_kv_heads query heads (GQA);
        by default H.
      head_dim: K; by default D / H.
      kv_width: width of what keys and values are made from; by default D (self-attention).
      bias: which of the projections "q", "k", "v", "o" have a bias (EVA's ViT-g has no "k").
      scale: factor on the scores; by default K ** -0.5.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kv_width: int | None = None,
        bias: str = "qkvo",
        scale: float | None = None,
        dropout_rate: float = 0.0,
        std: float = 0.02,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        head_dim = head_dim or width // num_heads
        kv_width = kv_width or width
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} heads cannot share {num_kv_heads} heads of keys evenly.")
        self.head_dim = head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.dropout_rate = dropout_rate

        def make(d_in: int, d_out: int, name: str) -> Linear:
            return linear(d_in, d_out, bias=name in bias, std=std, dtype=dtype, rngs=rngs)

        self.q_proj = make(width, num_heads * head_dim, "q")
        self.k_proj = make(kv_width, num_kv_heads * head_dim, "k")
        self.v_proj = make(kv_width, num_kv_heads * head_dim, "v")
        self.out_proj = make(num_heads * head_dim, width, "o")

    def _heads(self, x: jax.Array) -> jax.Array:
        """float[B, T, H * K] -> float[B, H, T, K]."""
        return x.reshape(*x.shape[:-1], -1, self.head_dim).swapaxes(-2, -3)

    def queries(self, x: jax.Array) -> jax.Array:
        """Queries of x: float[B, T, D] -> float[B, H, T, K]."""
        return self._heads(self.q_proj(x))

    def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of x: float[B, S, D_kv] -> two of float[B, H, S, K]."""
        return self._heads(self.k_proj(x)), self._heads(self.v_proj(x))

    def probabilities(self, x: jax.Array, k: jax.Array) -> jax.Array:
        """Attention of x, float[B, T, D], to keys, float[B, H, S, K]: float32[B, H, T, S]."""
        scores = jnp.einsum(
            "bhtk,bhsk->bhts", self.queries(x), k, preferred_element_type=jnp.float32
        )
        return jax.nn.softmax(scores * self.scale, axis=-1)

    def __call__(
        self,
        x: jax.Array,
        keys_values: tuple[jax.Array, jax.Array] | None = None,
        *,
        queries: jax.Array | None = None,
        mask: jax.Array | None = None,
        bias: jax.Array | None = None,
        past: Sequence[MaskedKV] = (),
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Attends from x, float[B, T, D], to itself or to given keys and values.

        `queries` are those of x where the caller has made them (and applied rotary positions);
        `past` are keys and values in front of these.
        """
        k, v = self.keys_values(x) if keys_values is None else keys_values
        q = self.queries(x) if queries is None else queries
        out = dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            past=past,
            scale=self.scale,
            dropout_rate=self.dropout_rate,
            key=key,
        )
        return self.out_proj(out.swapaxes(-2, -3).reshape(*x.shape[:-1], -1))


def causal_mask(num_queries: int, num_keys: int, offset: int = 0) -> jax.Array:
    """bool[T, S]: query t, which stands at position offset + t, sees keys 0 .. offset + t.

    For T = S = 4 and offset 0 (x: seen):

        x . . .
        x x . .
        x x x .
        x x x x
    """
    return jnp.arange(num_keys) <= offset + jnp.arange(num_queries)[:, None]
