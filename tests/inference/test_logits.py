"""Logits processors and warpers against those of transformers; samples against probabilities."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from blip2_jax.inference.logits import repeated_ngrams, sample, warp_logits
from blip2_jax.inference.options import Decoding

WARPERS = {
    "temperature": transformers.TemperatureLogitsWarper,
    "top_k": transformers.TopKLogitsWarper,
    "top_p": transformers.TopPLogitsWarper,
}


@pytest.mark.parametrize(
    "decoding",
    [
        dict(temperature=0.7),
        dict(top_k=4),
        dict(top_p=0.6),
        dict(temperature=1.5, top_k=12, top_p=0.9),
    ],
    ids=str,
)
def test_logits_are_warped_as_by_transformers(decoding):
    scores = np.random.default_rng(0).normal(size=(8, 50)).astype(np.float32) * 3
    want = torch.tensor(scores)
    for name, value in decoding.items():
        want = WARPERS[name](value)(None, want)
    got = warp_logits(jnp.asarray(scores)[:, None], Decoding(do_sample=True, **decoding))[:, 0]
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)


def test_samples_are_drawn_in_proportion():
    """Frequencies of 4,000 draws lie within five standard errors of the probabilities."""
    scores = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    draws = sample(jnp.broadcast_to(scores, (4000, 1, 4)), jnp.arange(4000), jax.random.key(0))
    share = np.bincount(np.asarray(draws).ravel(), minlength=4) / 4000
    probability = np.exp(scores)
    error = np.sqrt(probability * (1 - probability) / 4000)
    assert (np.abs(share - probability) < 5 * error).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_repeated_ngrams_are_those_of_transformers(size):
    """On long random rows of few tokens, after any number of steps, with and without a prompt."""
    rng = np.random.default_rng(size)
    ban = transformers.generation.NoRepeatNGramLogitsProcessor(size)
    tokens = rng.integers(0, 4, (3, 2, 20))
    for prefix, step in itertools.product((0, 1, 7), (0, 1, 2, 3, 9, 19)):
        ids = rng.integers(0, 4, (3, prefix))
        state = SimpleNamespace(
            tokens=jnp.asarray(tokens), step=step, prefix_ids=jnp.asarray(ids),
            prefix_mask=jnp.ones(ids.shape, int),
        )  # fmt: skip
        got = np.asarray(repeated_ngrams(state, size, 5))
        seen = np.concatenate([np.repeat(ids[:, None], 2, 1), tokens[..., :step]], axis=-1)
        rows = torch.tensor(seen.reshape(6, -1))
        want = ban(rows, torch.zeros(6, 5)).isinf().numpy().reshape(3, 2, 5)
        np.testing.assert_array_equal(got, want)
        if prefix:  # padding repeats nothing
            in_front = ((0, 0), (3, 0))
            state.prefix_ids = jnp.pad(state.prefix_ids, in_front)
            state.prefix_mask = jnp.pad(state.prefix_mask, in_front)
            np.testing.assert_array_equal(repeated_ngrams(state, size, 5), want)
