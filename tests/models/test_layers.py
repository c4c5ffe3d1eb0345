"""Dropout, attention and norms, against what they are defined as."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from blip2_jax.models import attention, layers


def test_dropout_keeps_the_mean():
    """What is kept is divided by the chance that it is kept."""
    out = np.asarray(layers.dropout(jnp.ones(40_000), 0.2, jax.random.key(0)))
    assert set(np.unique(out)) == {0.0, np.float32(1.25)}
    assert abs((out == 0).mean() - 0.2) < 5 * np.sqrt(0.2 * 0.8 / out.size)
    other = np.asarray(layers.dropout(jnp.ones(40_000), 0.2, jax.random.key(1)))
    assert 0.6 < (out == other).mean() < 0.76  # 0.8**2 + 0.2**2 = 0.68 of two that are independent
    np.testing.assert_array_equal(layers.dropout(jnp.ones(8), 0.2, None), np.ones(8))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_in_bfloat16_has_float32_scores(kv_heads):
    """Scores up to 60, where bfloat16 has steps of 0.25: probabilities would err by a quarter."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, heads, length, 16)), jnp.bfloat16)
        for heads, length in ((4, 5), (kv_heads, 9), (kv_heads, 9))
    )
    mask = jnp.arange(9) < jnp.array([9, 6])[:, None, None, None]
    out = attention.dot_product_attention(q, k, v, mask=mask, scale=4.0)
    wide = (np.asarray(x, np.float64) for x in (q, k, v))
    q, k, v = (np.repeat(x, 4 // x.shape[1], axis=1) for x in wide)
    scores = np.where(mask, 4.0 * np.einsum("bhtk,bhsk->bhts", q, k), -np.inf)
    assert 40 < np.abs(scores[np.isfinite(scores)]).max()
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    want = np.einsum("bhts,bhsk->bhtk", p / p.sum(axis=-1, keepdims=True), v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=0.02)


def test_a_layer_norm_stands_a_large_mean():
    """As residual streams have it: in one pass, the variance would be lost in the mean's square."""
    x = np.random.default_rng(0).normal(30.0, 0.1, (4, 64)).astype(np.float32)
    wide = x.astype(np.float64)
    variance = wide.var(axis=-1, keepdims=True)
    want = (wide - wide.mean(axis=-1, keepdims=True)) / np.sqrt(variance + 1e-6)
    norm = layers.layer_norm(64, eps=1e-6, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(norm(jnp.asarray(x)), want, atol=1e-4)
