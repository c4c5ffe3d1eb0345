"""Dropout and norms, against what they are defined as."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blip2_jax.models import layers


def test_dropout_keeps_the_mean():
    """What is kept is divided by the chance that it is kept."""
    out = np.asarray(layers.dropout(jnp.ones(40_000), 0.2, jax.random.key(0)))
    assert set(np.unique(out)) == {0.0, np.float32(1.25)}
    assert abs((out == 0).mean() - 0.2) < 5 * np.sqrt(0.2 * 0.8 / out.size)
    other = np.asarray(layers.dropout(jnp.ones(40_000), 0.2, jax.random.key(1)))
    assert 0.6 < (out == other).mean() < 0.76  # 0.8**2 + 0.2**2 = 0.68 of two that are independent
    np.testing.assert_array_equal(layers.dropout(jnp.ones(8), 0.2, None), np.ones(8))


def test_a_layer_norm_is_exact_for_a_large_mean():
    """As residual streams have it: in one pass, the variance would be lost in the mean's square."""
    x = np.random.default_rng(0).normal(30.0, 0.1, (4, 64)).astype(np.float32)
    wide = x.astype(np.float64)
    variance = wide.var(axis=-1, keepdims=True)
    want = (wide - wide.mean(axis=-1, keepdims=True)) / np.sqrt(variance + 1e-6)
    norm = layers.layer_norm(64, eps=1e-6, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(norm(jnp.asarray(x)), want, atol=1e-4)
