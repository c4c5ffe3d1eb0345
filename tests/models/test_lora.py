"""Low-rank adaptation: nothing at the start, trained alone, and merged into plain weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax import recipe
from blip2_jax.models import lora
from tests import tiny
from tests.stages import families

pytestmark = pytest.mark.integration


def config(family, folder, **changes):
    c = families.config(family, folder)
    c.trainable = ("ln_vision", "query_tokens", "qformer", "language_projection", "llm_lora")
    c.model.llm.lora.update({"rank": 3, "alpha": 6.0, **changes})
    return c


@pytest.mark.parametrize("family", families.LLMS)
def test_low_rank_paths_are_trained_and_nothing_else_of_the_language_model(family, tmp_path):
    c = config(family, tmp_path)
    run = recipe.build(c)
    assert run.abstract_frozen.keys() == {"vit", "llm"}
    plain = recipe.build(families.config(family, tmp_path))

    def shapes(r):
        return jax.tree.map(lambda x: x.shape, r.abstract_frozen)

    assert shapes(run) == shapes(plain)  # what a folder of weights fills, as before

    state, frozen = run.init_state(jax.random.key(0)), tiny.frozen(run)
    batch, key = tiny.batch(c), jax.random.key(1)
    start = {k: v for k, v in state["params"].items() if k != lora.PART}
    before = run.eval_step(state["params"], frozen, batch)
    assert before["loss"] == plain.eval_step(tiny.copy(start), frozen, batch)["loss"]
    was = tiny.copy(state["params"][lora.PART])
    for _ in range(3):
        state, metrics = run.train_step(state, frozen, batch, key)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), was, state["params"][lora.PART])
    assert all(jax.tree.leaves(changed))

    merged = run.merge_params(frozen, state["params"])
    assert lora.PART not in merged
    rest = {k: v for k, v in merged.items() if k in start}
    loss = plain.eval_step(rest, {"vit": merged["vit"], "llm": merged["llm"]}, batch)["loss"]
    adapted = run.eval_step(state["params"], frozen, batch)["loss"]
    np.testing.assert_allclose(loss, adapted, rtol=1e-5)
    unadapted = plain.eval_step(rest, frozen, batch)["loss"]
    assert abs(unadapted - adapted) > 1e-4


def test_the_path_is_w_plus_alpha_over_rank_b_a(tmp_path):
    run = recipe.build(config("opt", tmp_path, targets=("fc1",)))
    params = run.init_state(jax.random.key(0))["params"]
    low = params[lora.PART]["layers"]["blocks"]["mlp"]["fc1"]
    low["lora_b"] = jax.random.normal(jax.random.key(2), low["lora_b"].shape)
    frozen = tiny.frozen(run)
    kernel = np.asarray(frozen["llm"]["layers"]["blocks"]["mlp"]["fc1"]["kernel"])
    merged = run.merge_params(frozen, params)["llm"]["layers"]["blocks"]["mlp"]["fc1"]["kernel"]
    change = np.einsum("lir,lro->lio", low["lora_a"], low["lora_b"])
    np.testing.assert_allclose(merged, kernel + 6.0 / 3 * change, atol=1e-5)


def test_partition_and_combine_are_inverses():
    leaf = jnp.zeros(2)
    layer = {"kernel": leaf, "lora_a": leaf, "lora_b": leaf}
    whole = {"vit": {"x": leaf}, "llm": {"a": {"q_proj": layer, "k_proj": {"kernel": leaf}}}}
    parts = lora.partition(whole)
    assert parts["llm_lora"] == {"a": {"q_proj": {"lora_a": leaf, "lora_b": leaf}}}
    assert jax.tree.structure(lora.combine(parts)) == jax.tree.structure(whole)
    assert lora.combine({"vit": {}}) == lora.partition({"vit": {}}) == {"vit": {}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("query",)}, "has the linear layers .*'q_proj'"),
        ({"targets": ()}, "linear layers"),
        ({"rank": -1}, "rank -1 and alpha 6.0; both are > 0"),
        ({"alpha": 0.0}, "both are > 0"),
    ],
)
def test_what_cannot_be_adapted_is_an_error(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        recipe.build(config("opt", tmp_path, **changes))


def test_paths_without_training_are_an_error(tmp_path):
    c = config("opt", tmp_path)
    c.trainable = c.trainable[:-1]
    with pytest.raises(ValueError, match="llm_lora"):
        recipe.build(c)
    plain = families.config("opt", tmp_path)
    plain.trainable = (*plain.trainable, "llm_lora")
    with pytest.raises(ValueError, match=r"config.model.llm.lora.rank"):
        recipe.build(plain)
