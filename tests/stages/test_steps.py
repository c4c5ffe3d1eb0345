"""What the train steps of both stages promise."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tests.tiny as tiny
from blip2_jax import recipe

pytestmark = pytest.mark.integration

STAGES = ("stage1", "stage2")


@pytest.fixture(scope="module", params=STAGES)
def trained(request):
    """A run of ten steps on a (2, 2, 2) mesh; the state after one is kept beside the last."""
    changes = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "model.qformer.dropout": 0.1}
    config = tiny.config(request.param, **changes)
    run = recipe.build(config)
    state, frozen = run.init_state(jax.random.key(0)), tiny.frozen(run)
    before = tiny.copy((state, frozen))
    metrics, first = [], None
    for _ in range(10):
        state, m = run.train_step(state, frozen, tiny.batch(config), jax.random.key(1))
        metrics.append({k: float(v) for k, v in m.items()})
        first = tiny.copy(state) if first is None else first
    return run, before, state, frozen, metrics, first


def test_frozen_means_frozen(trained):
    """Towers keep every bit; they have no gradient, no optimizer slot, no place in the state."""
    run, (_, frozen_before), state, frozen, *_ = trained
    jax.tree.map(np.testing.assert_array_equal, frozen_before, frozen)
    assert frozen.keys() >= {"vit"} and not frozen.keys() & state["params"].keys()
    slots = sum(x.size for x in jax.tree.leaves(state["opt_state"]))
    params = sum(x.size for x in jax.tree.leaves(state["params"]))
    assert slots < 2 * params + 10


def test_everything_trainable_is_trained(trained):
    run, (before, _), state, *_ = trained
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before["params"], state["params"])
    still = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, moved in jax.tree_util.tree_leaves_with_path(changed)
        if not moved
    ]
    assert not still, still


def test_loss_falls_and_metrics_are_complete(trained):
    run, _, state, _, metrics, _ = trained
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    parts = {"stage1": ("itc/accuracy", "itm/accuracy", "itg/perplexity", "itc/temperature")}
    wanted = {"grad_norm", "update_norm", "learning_rate", *parts.get(run.config.stage.name, ())}
    assert wanted <= metrics[0].keys()
    assert int(state["step"]) == 10


def test_the_rate_that_is_logged_is_the_rate_that_is_applied(trained):
    """AdamW's first update is the rate itself, where the gradient is far above epsilon."""
    run, (before, _), _, _, metrics, first = trained
    optim = run.config.optim
    warmup = np.linspace(optim.warmup_start_lr, optim.peak_lr, optim.warmup_steps + 1)
    logged = [m["learning_rate"] for m in metrics]
    np.testing.assert_allclose(logged[: len(warmup)], warmup, rtol=1e-5)
    assert logged[-1] < logged[len(warmup) - 1]

    def bias(state):
        return state["params"]["ln_vision"]["bias"]  # no weight decay

    moved = np.abs(jax.device_get(bias(first)) - jax.device_get(bias(before)))
    np.testing.assert_allclose(moved.max(), logged[0], rtol=1e-3)


def test_every_step_has_a_dropout_of_its_own(trained):
    """Of the same parameters, batch and key: step 0 again is step 0, step 5 is another."""
    run, (before, frozen_before), _, _, metrics, _ = trained
    results = []
    for step in (0, 5):
        state, frozen = tiny.copy((before, frozen_before))
        state["step"] = jax.device_put(jnp.asarray(step, jnp.int32), state["step"].sharding)
        batch = tiny.batch(run.config)
        results.append(run.train_step(state, frozen, batch, jax.random.key(1))[1]["loss"])
    assert float(results[0]) == metrics[0]["loss"]
    assert abs(float(results[1]) - metrics[0]["loss"]) > 1e-4


def test_one_compile(trained):
    assert trained[0].train_step._cache_size() == 1


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_in_bfloat16_with_remat_is_near_the_one_in_float32(stage):
    """As the recipes train: 8 bits of mantissa, blocks computed again in the backward pass.

    The loss is within 1% and the gradient within 5% of its length.
    """
    results = []
    for dtype, remat in (("float32", "none"), ("bfloat16", "full")):
        changes = {f"model.{tower}.remat": remat for tower in ("vit", "qformer", "llm")}
        config = tiny.config(stage, dtype=dtype, frozen_dtype=dtype, **changes)
        run = recipe.build(config, recipe.meshes.make_mesh(config.mesh, jax.devices()[:1]))
        params, frozen = run.init_state(jax.random.key(0))["params"], tiny.frozen(run)
        loss = functools.partial(run.stage.loss_fn, spec=run.spec)
        gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (value, _), grads = gradient(params, frozen, tiny.batch(config), None)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(grads))
        flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(grads))])
        results.append((float(value), flat))
    (exact, want), (near, got) = results
    assert near == pytest.approx(exact, rel=0.01) and near != exact
    assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)


def test_no_device_is_given_every_image():
    """Hard negatives come from the whole batch; the features of the whole batch do not."""
    run = recipe.build(tiny.config("stage1", **{"mesh.data": 8, "mesh.fsdp": 1}))
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tiny.batch(run.config).items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = run.train_step.lower(run.abstract_state, run.abstract_frozen, batch, key)
    gathered = [
        math.prod(map(int, dims.split(",")))
        for dims in re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", step.compile().as_text())
    ]
    c = run.model_config
    features = run.config.data.batch_size * c.vit.num_tokens * c.vit.hidden_size
    # Projected queries and texts are gathered: that is what the contrast is about.
    queries = run.config.data.batch_size * c.qformer.num_query_tokens * c.projection_dim
    assert gathered and max(gathered) <= queries < features


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_device_works_in_falls_with_the_number_of_devices(stage):
    """Of the same global batch: eight devices need less than a sixth each."""
    needed = []
    for devices in (1, 8):
        config = tiny.config(stage, **{"data.batch_size": 128, "mesh.fsdp": devices})
        mesh = recipe.meshes.make_mesh(config.mesh, jax.devices()[:devices])
        program = recipe.build(config, mesh).lower_step().compile()
        needed.append(program.memory_analysis().temp_size_in_bytes)
    assert needed[1] < needed[0] / 6


def test_no_gradient_reaches_the_frozen_encoder_through_the_model():
    """`stop_gradient` on its output, not only the absence of an optimizer."""
    run = recipe.build(tiny.config("stage2"))
    params, frozen = run.init_state(jax.random.key(0))["params"], tiny.frozen(run)

    def loss(frozen):
        return run.stage.loss_fn(params, frozen, tiny.batch(run.config), None, spec=run.spec)[0]

    grads = jax.grad(loss)(frozen)
    assert all(not g.any() for g in jax.tree.leaves(grads["vit"]))
    assert any(g.any() for g in jax.tree.leaves(grads["llm"]))  # gradients do flow through it


def test_itm_of_two_pairs_takes_the_only_negative_there_is():
    """With a batch of two the hard negatives are certain: the loss does not depend on the key."""
    run = recipe.build(
        tiny.config("stage1", **{"data.batch_size": 2}),
        recipe.meshes.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1]),
    )
    params, frozen = run.init_state(jax.random.key(0))["params"], tiny.frozen(run)
    batch = jax.tree.map(jnp.asarray, tiny.batch(run.config))

    def loss(key):
        return run.stage.loss_fn(params, frozen, batch, key, spec=run.spec)[1]["itm/loss"]

    assert loss(jax.random.key(0)) == loss(jax.random.key(1)) == loss(None)


def test_pairs_of_one_image_are_strangers_without_image_ids():
    """As in LAVIS, where a part of the mixture has none."""
    changes = {"stage.objectives": ("itc",), "stage.use_image_ids": False}
    config = tiny.config("stage1", **changes)
    run = recipe.build(config, recipe.meshes.make_mesh(config.mesh, jax.devices()[:1]))
    params, frozen = run.init_state(jax.random.key(0))["params"], tiny.frozen(run)
    batch = {**tiny.batch(config), "image_id": np.zeros(config.data.batch_size, np.int32)}
    results = run.eval_step(params, frozen, batch)
    want = _first_losses(("itc",))  # of as many images as pairs
    assert results["itc/loss"] == pytest.approx(float(want["itc/loss"]), rel=1e-6)
    assert results["itc/accuracy"] == want["itc/accuracy"]


@functools.cache
def _first_losses(objectives: tuple[str, ...]):
    config = tiny.config("stage1", **{"stage.objectives": objectives})
    run = recipe.build(config, recipe.meshes.make_mesh(config.mesh, jax.devices()[:1]))
    params, frozen = run.init_state(jax.random.key(0))["params"], tiny.frozen(run)
    return run.eval_step(params, frozen, tiny.batch(config))


@pytest.mark.parametrize("objectives", [("itc",), ("itm",), ("itc", "itm"), ("itc", "itg")])
def test_objectives_that_are_left_out_leave_the_others_as_they_are(objectives):
    """The loss is the sum of those that are named."""
    part, whole = _first_losses(objectives), _first_losses(("itc", "itm", "itg"))
    named = {name.partition("/")[0] for name in part if name[:3] in ("itc", "itm", "itg")}
    assert named == {"itc", *objectives}  # the similarities of ITC are made in any case
    for name in (name for name in whole if name.partition("/")[0] in objectives):
        np.testing.assert_allclose(part[name], whole[name], rtol=1e-6, err_msg=name)
    total = sum(part[f"{name}/loss"] for name in objectives)
    np.testing.assert_allclose(part["loss"], total, rtol=1e-6)


@pytest.mark.parametrize("objectives", [(), ("itc", "captioning")])
def test_unknown_objectives_are_refused(objectives):
    with pytest.raises(ValueError, match="names one or more of itc, itm, itg"):
        recipe.build(tiny.config("stage1", **{"stage.objectives": objectives}))


def test_a_typo_in_trainable_is_an_error():
    with pytest.raises(ValueError, match="qfromer"):
        recipe.build(tiny.config("stage1", trainable=("qfromer",)))


def test_a_batch_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match=r"batch_size 6 .* 8 devices"):
        recipe.build(tiny.config("stage1", **{"data.batch_size": 6}))
