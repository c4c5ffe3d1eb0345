"""The losses against independent computations in PyTorch and numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from blip2_jax.stages import losses

B, Q, P = 6, 4, 8


@pytest.fixture
def features():
    rng = np.random.default_rng(0)

    def unit(x):
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    return unit(rng.normal(size=(B, Q, P))), unit(rng.normal(size=(B, P)))


def torch_itc(image, text, temperature, targets, gather_grad):
    """As LAVIS writes it: two products, maximum over queries, cross-entropy with soft targets."""
    still = (lambda x: x) if gather_grad else (lambda x: x.detach())
    i2t = torch.stack([(image[b] @ still(text).T).max(dim=0).values for b in range(B)])
    t2i = torch.stack([(still(image) @ text[b]).max(dim=1).values for b in range(B)])
    cross = torch.nn.functional.cross_entropy
    return 0.5 * (cross(i2t / temperature, targets) + cross(t2i / temperature, targets))


@pytest.mark.parametrize("gather_grad", [True, False])
@pytest.mark.parametrize("shared", [False, True], ids=["pairs", "shared images"])
def test_itc_equals_torch_with_gradients(features, gather_grad, shared):
    image_id = np.array([0, 1, 2, 0, 4, 2]) if shared else np.arange(B)
    same = image_id[:, None] == image_id[None]
    targets = 0.9 * same / same.sum(1, keepdims=True) + 0.1 / B

    leaves = [torch.tensor(x, requires_grad=True) for x in (*features, np.float32(0.07))]
    want = torch_itc(*leaves, torch.tensor(targets, dtype=torch.float32), gather_grad)
    want.backward()

    def loss(image, text, temperature):
        return losses.itc_loss(
            image, text, temperature, jnp.asarray(same), label_smoothing=0.1,
            gather_grad=gather_grad,
        )[0]  # fmt: skip

    got, grads = jax.value_and_grad(loss, argnums=(0, 1, 2))(*features, jnp.float32(0.07))
    np.testing.assert_allclose(got, want.item(), rtol=1e-5)
    for ours, theirs in zip(grads, leaves, strict=True):
        np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=1e-4, atol=1e-5)


def test_smoothed_cross_entropy_equals_torch():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(5, 9)).astype(np.float32)
    targets = rng.integers(0, 9, 5)
    want = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(targets), label_smoothing=0.1, reduction="none"
    )
    got = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(targets), label_smoothing=0.1)
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-5)


def test_itc_is_blind_to_the_order_of_the_batch(features):
    order = np.random.default_rng(2).permutation(B)
    same = jnp.eye(B, dtype=bool)

    def run(i, t):
        return losses.itc_loss(i, t, 0.07, same, label_smoothing=0.1, gather_grad=True)[0]

    image, text = features
    np.testing.assert_allclose(run(image, text), run(image[order], text[order]), rtol=1e-6)


def test_hard_negatives_are_never_positives_and_follow_the_softmax():
    same = jnp.asarray([[1, 0, 1], [0, 1, 0], [1, 0, 1]], bool)
    sims = jnp.asarray([[5.0, 0.0, 9.0], [1.0, 50.0, 0.0], [3.0, 0.0, 2.0]])
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(jax.vmap(lambda k: losses.hard_negatives(k, sims, same))(keys))
    assert (drawn[:, 0] == 1).all() and (drawn[:, 2] == 1).all()
    want = np.exp(1.0) / (np.exp(1.0) + 1.0)  # row 1: similarities 1 and 0
    assert abs((drawn[:, 1] == 0).mean() - want) < 0.03
    assert not (drawn[:, 1] == 1).any()


def test_weighted_mean_of_nothing_is_zero():
    assert losses.weighted_mean(jnp.ones(3), jnp.zeros(3)) == 0.0
