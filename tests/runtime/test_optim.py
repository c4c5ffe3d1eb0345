import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax import cli
from blip2_jax.runtime import optim, state

CONFIG = {
    "peak_lr": 1e-3,
    "warmup_start_lr": 1e-6,
    "end_lr": 1e-5,
    "warmup_steps": 10,
    "schedule": "per_step",
    "steps_per_epoch": 0,
    "total_steps": 100,
    "betas": (0.9, 0.98),
    "eps": 1e-8,
    "weight_decay": 0.05,
    "clip_norm": 0.0,
    "decay_biases": False,
    "decay_temperature": True,
}
PARAMS = {
    "layers": {  # Stacked: a layer axis in front.
        "norm": {"scale": jnp.ones((3, 4)), "bias": jnp.ones((3, 4))},
        "query": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4))},
        "q_bias": jnp.ones((3, 4)),
    },
    "norm": {"scale": jnp.ones(4)},
    "query_tokens": jnp.ones((1, 2, 4)),
    "temp": jnp.float32(0.07),
}


def test_the_learning_rate_at_its_corners():
    schedule = optim.make_schedule(CONFIG)
    assert schedule(0) == pytest.approx(1e-6, rel=1e-4)
    assert schedule(5) == pytest.approx((1e-6 + 1e-3) / 2)
    assert schedule(10) == pytest.approx(1e-3)
    assert schedule(55) == pytest.approx((1e-3 + 1e-5) / 2)
    assert schedule(100) == pytest.approx(1e-5)
    assert schedule(1000) == pytest.approx(1e-5)


def test_a_run_without_warmup_starts_at_the_peak():
    assert optim.make_schedule(CONFIG | {"warmup_steps": 0})(0) == pytest.approx(1e-3)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(
        ValueError, match="is 100 and config.steps is 100.*--config.optim.warmup_steps=10"
    ):
        optim.make_schedule(CONFIG | {"warmup_steps": 100})


# LAVIS's YAMLs in lavis/projects/blip2/train: peak, least and first rate, warmup, epochs; and the
# steps of an epoch on 16 GPUs: each has ceil(samples / 16), and drops what fills no batch.
LAVIS = {
    "stage1.py:vitg-lavis": (1e-4, 1e-5, 1e-6, 5000, 10, 867),  # pretrain_stage1.yaml
    "stage2.py:vitg-opt2.7b-lavis": (1e-4, 1e-5, 1e-6, 2000, 10, 1355),  # pretrain_stage2.yaml
    "finetune_caption.py:vitg-opt2.7b-lavis": (1e-5, 0.0, 1e-8, 1000, 5, 2213),  # caption_coco_ft
    "finetune_retrieval.py:vitg-lavis": (1e-5, 0.0, 1e-8, 1000, 5, 2530),  # retrieval_coco_ft
}


@pytest.mark.parametrize("name", LAVIS)
def test_the_rate_is_lavis_at_every_step_of_its_recipes(name):
    """Its scheduler is asked before each step, by epoch and by step within the epoch."""
    peak, least, first, warmup, epochs, length = LAVIS[name]
    want = []
    for epoch in range(epochs):
        for step in range(length):
            if epoch == 0:
                want.append(min(peak, first + (peak - first) * step / warmup))
            else:
                want.append(least + (peak - least) * (1 + math.cos(math.pi * epoch / epochs)) / 2)
    config = cli.load_config(f"configs/{name}")
    schedule = optim.make_schedule({**config.optim, "total_steps": config.steps})
    got = jax.jit(jax.vmap(schedule))(jnp.arange(config.steps))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert len(want) == config.steps


def test_a_warmup_beyond_the_first_epoch_is_cut_off_and_a_missing_one_is_one_step():
    def of(**changes):
        return optim.make_schedule(
            CONFIG | {"schedule": "per_epoch", "steps_per_epoch": 4, "total_steps": 12} | changes
        )

    rates = [float(of()(step)) for step in range(14)]
    slope = (1e-3 - 1e-6) / 10
    cosine = [1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * n / 3)) for n in (1, 2, 3)]
    want = [1e-6 + slope * n for n in range(4)] + [cosine[0]] * 4 + [cosine[1]] * 4
    np.testing.assert_allclose(rates, want + [cosine[2]] * 2, rtol=1e-5)
    np.testing.assert_allclose([of(warmup_steps=0)(n) for n in (0, 1)], [1e-6, 1e-3], rtol=1e-5)
    # A run that is shorter than an epoch has the first part of the first.
    np.testing.assert_allclose(of(total_steps=2)(1), want[1], rtol=1e-5)


def test_a_schedule_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="schedule is 'hourly'; known: per_step, per_epoch"):
        optim.make_schedule(CONFIG | {"schedule": "hourly"})
    with pytest.raises(ValueError, match="config.optim.steps_per_epoch is 0"):
        optim.make_schedule(CONFIG | {"schedule": "per_epoch"})


def test_what_lavis_decays_is_decayed_in_stacks_too():
    mask = optim.decay_mask(PARAMS, decay_biases=False, decay_temperature=True)
    assert mask == {
        "layers": {
            "norm": {"scale": False, "bias": False},
            "query": {"kernel": True, "bias": False},
            "q_bias": False,
        },
        "norm": {"scale": False},
        "query_tokens": True,
        "temp": True,
    }


def test_the_decay_flags_reach_biases_and_the_temperature():
    mask = optim.decay_mask(PARAMS, decay_biases=True, decay_temperature=False)
    assert mask["layers"]["query"]["bias"]
    assert not mask["temp"]
    assert not mask["layers"]["norm"]["scale"]


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="nothing to train"):
        optim.make_optimizer(CONFIG, {})


def adamw(params, grads, steps):
    """AdamW as PyTorch documents it, on one array."""
    beta1, beta2 = CONFIG["betas"]
    schedule = optim.make_schedule(CONFIG)
    m = v = np.zeros_like(params)
    for t in range(1, steps + 1):
        lr = float(schedule(t - 1))
        m = beta1 * m + (1 - beta1) * grads
        v = beta2 * v + (1 - beta2) * grads**2
        params = params * (1 - lr * CONFIG["weight_decay"])
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        params = params - lr * m_hat / (np.sqrt(v_hat) + CONFIG["eps"])
    return params


def test_steps_are_those_of_adamw():
    kernel = np.asarray(jax.random.normal(jax.random.key(0), (4, 4)), np.float64)
    grads = np.asarray(jax.random.normal(jax.random.key(1), (4, 4)), np.float64)
    grads *= np.array([1.0, 1e-3, 1e-7, 1e-8])[:, None]  # down to where epsilon counts
    params = {"kernel": jnp.asarray(kernel, jnp.float32)}
    tx, _ = optim.make_optimizer(CONFIG, params)
    train_state = state.init_state(lambda key: params, tx, jax.random.key(0))
    for _ in range(20):
        train_state, metrics = optim.apply_gradients(
            train_state, {"kernel": jnp.asarray(grads, jnp.float32)}, tx, jnp.float32(1)
        )
    assert train_state["step"] == 20
    np.testing.assert_allclose(
        train_state["params"]["kernel"], adamw(kernel, grads, 20), rtol=0, atol=1e-6
    )
    assert metrics["grad_norm"] == pytest.approx(np.linalg.norm(grads), rel=1e-5)
    assert set(metrics) == {"grad_norm", "update_norm", "param_norm"}


def test_clipping_is_by_the_global_norm():
    params = {"a": jnp.zeros((2, 2)), "b": jnp.zeros((2, 2))}
    grads = {"a": jnp.full((2, 2), 30.0), "b": jnp.full((2, 2), 40.0)}
    tx, _ = optim.make_optimizer(CONFIG | {"clip_norm": 1.0}, params)
    _, opt_state = tx.update(grads, tx.init(params), params)
    (mu,) = [part.mu for part in opt_state if hasattr(part, "mu")]
    np.testing.assert_allclose(mu["a"], 0.1 * 0.3, rtol=1e-5)
    np.testing.assert_allclose(mu["b"], 0.1 * 0.4, rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_but_counters():
    params = {"kernel": jnp.ones((4, 4))}
    tx, _ = optim.make_optimizer(CONFIG | {"clip_norm": 1.0}, params)
    step = jax.jit(lambda s, grads, loss: optim.apply_gradients(s, grads, tx, loss)[0])
    good = {"kernel": jnp.full((4, 4), 0.5)}
    before = step(state.init_state(lambda key: params, tx, jax.random.key(0)), good, 1.0)
    assert (before["step"], before["bad_steps"]) == (1, 0)
    for bad in (jnp.nan, jnp.inf):
        one = {"kernel": good["kernel"].at[2, 1].set(bad)}
        for grads, loss in ((one, 1.0), (good, bad)):
            after = step(before, grads, loss)
            assert (after["step"], after["bad_steps"]) == (2, 1)
            for part in ("params", "opt_state"):
                jax.tree.map(np.testing.assert_array_equal, after[part], before[part])
