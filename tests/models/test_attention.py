"""Attention, against what it is defined as."""

import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax.models import attention


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
