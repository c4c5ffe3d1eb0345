"""The three attention patterns of the Q-Former, seen from outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from blip2_jax.models.qformer import (
    QFormer,
    QFormerConfig,
    key_mask,
    multimodal_causal_mask,
)

CONFIG = QFormerConfig(
    num_query_tokens=5, hidden_size=32, num_layers=4, num_heads=4, mlp_dim=64, encoder_width=24,
    vocab_size=50, bos_token_id=49, max_position_embeddings=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def setup():
    qformer = QFormer(CONFIG, rngs=nnx.Rngs(0))
    # Away from initialization, so that every path changes the output by more than rounding.
    params = nnx.to_pure_dict(nnx.state(qformer))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    leaves = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    qformer = nnx.merge(nnx.graphdef(qformer), jax.tree.unflatten(tree, leaves))
    rng = np.random.default_rng(0)
    queries = jnp.asarray(rng.normal(size=(2, 5, 32)), jnp.float32)
    image = jnp.asarray(rng.normal(size=(2, 7, 24)), jnp.float32)
    ids = jnp.asarray(rng.integers(1, 49, (2, 6)))
    mask = jnp.asarray([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    return qformer, queries, image, ids, mask


def test_generation_from_the_cache_equals_one_pass_under_the_whole_mask(setup):
    """Text on top of the queries' keys and values = queries and text with the UniLM mask."""
    qformer, queries, image, ids, mask = setup
    image_kv = qformer.image_keys_values(image)
    _, past = qformer(queries, image_kv=image_kv)
    cached, _ = qformer(text_ids=ids, mask=multimodal_causal_mask(mask, 5), past=past)

    q_rows = jnp.broadcast_to(jnp.arange(11) < 5, (2, 1, 5, 11))
    whole_mask = jnp.concatenate([q_rows, multimodal_causal_mask(mask, 5)], axis=2)
    whole, _ = qformer(queries, ids, image_kv=image_kv, mask=whole_mask)
    np.testing.assert_allclose(cached, whole[:, 5:], atol=1e-5)


def test_generation_cannot_see_the_future(setup):
    qformer, queries, image, ids, mask = setup
    _, past = qformer(queries, image_kv=qformer.image_keys_values(image))

    def run(ids):
        return qformer(text_ids=ids, mask=multimodal_causal_mask(mask, 5), past=past)[0]

    before, after = run(ids), run(ids.at[0, 3].set((ids[0, 3] + 1) % 49))
    np.testing.assert_array_equal(before[0, :3], after[0, :3])
    assert np.abs(before[0, 3:] - after[0, 3:]).min(axis=-1).max() > 0


def test_matching_lets_queries_see_text_and_text_see_the_image_through_them(setup):
    qformer, queries, image, ids, mask = setup

    def run(ids, image):
        return qformer(
            queries, ids, image_kv=qformer.image_keys_values(image), mask=key_mask(mask, 5)
        )[0]

    base = run(ids, image)
    assert np.abs(base[:, :5] - run(ids.at[0, 2].add(1), image)[:, :5])[0].max() > 1e-3
    assert np.abs(base[:, 5:] - run(ids, image + 1.0)[:, 5:]).max() > 1e-3


def test_padding_is_seen_by_nobody(setup):
    qformer, queries, image, ids, mask = setup
    other = ids.at[1, 4:].set(7)
    image_kv = qformer.image_keys_values(image)
    real = np.asarray(mask) > 0
    for run in (
        lambda ids: qformer(text_ids=ids, mask=key_mask(mask))[0],
        lambda ids: qformer(queries, ids, image_kv=image_kv, mask=key_mask(mask, 5))[0][:, 5:],
    ):
        np.testing.assert_array_equal(np.asarray(run(ids))[real], np.asarray(run(other))[real])


def test_text_alone_never_looks_at_the_image(setup):
    """No cross-attention parameter has a gradient in the text pass; in the query pass all have."""
    qformer, queries, image, ids, mask = setup
    graph, params = nnx.graphdef(qformer), nnx.to_pure_dict(nnx.state(qformer))

    def text(params):
        return jnp.square(nnx.merge(graph, params)(text_ids=ids, mask=key_mask(mask))[0]).sum()

    def query(params):
        model = nnx.merge(graph, params)
        out, _ = model(queries, image_kv=model.image_keys_values(image))
        return (out * jnp.arange(32.0)).sum()

    cross = jax.grad(text)(params)["groups"]["blocks"]["crossattention"]
    assert all(not g.any() for g in jax.tree.leaves(cross))
    grads = jax.grad(query)(params)["groups"]["blocks"]
    assert grads["crossattention"]["attention"]["v_proj"]["kernel"].any(axis=(1, 2)).all()
    assert all(not g.any() for g in jax.tree.leaves(grads["layers"]["mlp_text"]))


def test_attention_maps_are_distributions_over_the_image(setup):
    qformer, queries, image, _, _ = setup
    maps = qformer.attention_maps(queries, qformer.image_keys_values(image))
    assert maps.shape == (2, 2, 4, 5, 7)
    np.testing.assert_allclose(maps.sum(axis=-1), 1.0, atol=1e-6)


def test_the_stage_2_form_has_no_text_branch():
    text_free = nnx.to_pure_dict(nnx.state(QFormer(CONFIG, text=False, rngs=nnx.Rngs(0))))
    assert "word_embeddings" not in text_free
    assert "mlp_text" not in text_free["groups"]["blocks"]["layers"]


def test_layers_that_do_not_divide_into_groups_are_refused():
    import dataclasses

    with pytest.raises(ValueError, match="cross_attention_frequency"):
        QFormer(dataclasses.replace(CONFIG, num_layers=3), rngs=nnx.Rngs(0))
