"""Fine-tuning: a trained encoder, its rates by depth, batches in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tests.tiny as tiny
from blip2_jax import recipe
from blip2_jax.models import vit
from blip2_jax.models.vit import ViT, ViTConfig
from blip2_jax.runtime import mesh as meshes
from blip2_jax.weights import huggingface

pytestmark = pytest.mark.integration

TRAINED = ("vit", "ln_vision", "query_tokens", "qformer", "language_projection")


@pytest.fixture(scope="module")
def one_device():
    return meshes.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])


def first_step(config, mesh):
    """Parameters before and after one step, and its metrics."""
    run = recipe.build(config, mesh)
    state, frozen = run.init_state(jax.random.key(0)), tiny.frozen(run)
    before = jax.device_get(state["params"])
    state, metrics = run.train_step(state, frozen, tiny.batch(config), jax.random.key(1))
    return before, jax.device_get(state["params"]), jax.device_get(metrics)


def test_a_batch_in_parts_is_the_whole_batch(one_device):
    """Parts hold unequal numbers of tokens, and are weighed by them."""
    _, whole, metrics = first_step(tiny.config("stage2"), one_device)
    _, parts, of_parts = first_step(tiny.config("stage2", **{"stage.accumulate": 4}), one_device)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole, parts)
    for name in ("loss", "tokens", "grad_norm", "lm/token_accuracy"):
        np.testing.assert_allclose(of_parts[name], metrics[name], rtol=1e-4, err_msg=name)


def test_a_contrast_in_parts_is_refused(one_device):
    with pytest.raises(ValueError, match=r"accumulate is above 1, .*--config.stage.accumulate=1"):
        first_step(tiny.config("stage1", **{"stage.accumulate": 2}), one_device)
    with pytest.raises(ValueError, match="batch_size 8 .*in 3 parts"):
        recipe.build(tiny.config("stage2", **{"stage.accumulate": 3}), one_device)


def test_blocks_are_left_out_the_more_the_deeper_they_lie(monkeypatch):
    """EVA's and timm's rule: from 0 in the first block, evenly to the rate in the last."""
    seen = []

    def drop_path(x, rate, key):
        assert key is not None
        jax.debug.callback(lambda r: seen.append(float(r)), rate, ordered=True)
        return x

    monkeypatch.setattr(vit, "drop_path", drop_path)
    sizes = ViTConfig(
        image_size=16, patch_size=8, hidden_size=8, num_layers=5, num_heads=1, mlp_dim=8,
        drop_path=0.4,
    )  # fmt: skip
    images = np.zeros((1, 16, 16, 3), np.uint8)
    ViT(sizes, rngs=nnx.Rngs(0))(images, jax.random.key(0)).block_until_ready()
    jax.effects_barrier()
    # Attention and feed-forward of each block.
    np.testing.assert_allclose(seen, np.repeat([0.0, 0.1, 0.2, 0.3, 0.4], 2), atol=1e-6)


def test_rates_fall_from_block_to_block(one_device):
    """The update of every parameter of the encoder is the plain one times its factor."""
    plain = tiny.config("stage2", trainable=TRAINED)
    decayed = tiny.config("stage2", trainable=TRAINED, **{"optim.vit_layer_decay": 0.5})
    before, after, _ = first_step(plain, one_device)
    _, slower, _ = first_step(decayed, one_device)
    update = jax.tree.map(lambda a, b: b - a, before, after)
    less = jax.tree.map(lambda a, b: b - a, before, slower)
    factors = {"embeddings": 0.5**3, 0: 0.5**2, 1: 0.5**1}  # of two blocks

    def close(a, b):
        return np.testing.assert_allclose(a, b, atol=1e-7, rtol=2e-3)

    for name in ("cls_token", "pos_embed", "patch_embed"):
        jax.tree.map(
            lambda a, b: close(a, factors["embeddings"] * b), less["vit"][name], update["vit"][name]
        )
    for block in (0, 1):
        jax.tree.map(
            lambda a, b, i=block: close(a[i], factors[i] * b[i]),
            less["vit"]["layers"],
            update["vit"]["layers"],
        )
    for name in set(TRAINED) - {"vit"}:
        jax.tree.map(close, less[name], update[name])
    assert max(np.abs(x).max() for x in jax.tree.leaves(update["vit"])) > 1e-4  # it is trained
    with pytest.raises(ValueError, match="vit_layer_decay is for a trained ViT"):
        recipe.build(tiny.config("stage2", **{"optim.vit_layer_decay": 0.9}), one_device)


def test_drop_path_leaves_whole_rows_out_and_keeps_the_mean():
    x = jnp.ones((4000, 3))
    out = np.asarray(vit.drop_path(x, 0.25, jax.random.key(0)))
    rows = out[:, 0]
    assert (out == rows[:, None]).all() and set(np.unique(rows)) == {0.0, np.float32(4 / 3)}
    error = (4 / 3) * np.sqrt(0.25 * 0.75 / 4000)
    assert abs(rows.mean() - 1) < 5 * error
    np.testing.assert_array_equal(vit.drop_path(x, 0.25, None), x)


def test_drop_path_is_for_training_only():
    sizes = ViTConfig(16, 8, 24, 2, 2, 32, drop_path=0.5)
    model = ViT(sizes, rngs=nnx.Rngs(0))
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    still = model(images)
    np.testing.assert_array_equal(still, model(images))
    moved = model(images, jax.random.key(0))
    assert not np.allclose(still, moved)
    np.testing.assert_array_equal(moved, model(images, jax.random.key(0)))


def test_a_trained_encoder_starts_from_its_source_at_another_resolution(one_device, tmp_path):
    sizes = ViTConfig(16, 8, 24, 2, 2, 32, "quick_gelu", 1e-5, "qkvo", False, True, True)
    params = nnx.to_pure_dict(nnx.state(ViT(sizes, rngs=nnx.Rngs(3))))
    huggingface.save(tmp_path, sizes, params)
    changes = {"model.vit.source": str(tmp_path), "model.vit.resolution": 32}
    run = recipe.build(tiny.config("stage2", trainable=TRAINED, **changes), one_device)
    assert run.image_size == 32 and run.model_config.vit.num_tokens == 17
    state = run.load_trained_towers(run.init_state(jax.random.key(0)))
    got = jax.device_get(state["params"]["vit"])
    jax.tree.map(np.testing.assert_array_equal, got["layers"], params["layers"])
    assert got["pos_embed"].shape == (1, 17, 24)
    np.testing.assert_array_equal(got["pos_embed"][:, 0], params["pos_embed"][:, 0])
