import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from blip2_jax.runtime import mesh as mesh_lib
from blip2_jax.runtime import state


def init_params(key):
    return {
        "a": {"kernel": jax.random.normal(key, (16, 8)), "bias": jnp.zeros(8)},
        "temp": jnp.float32(0.07),
    }


def test_moments_lie_with_their_parameter():
    mesh = mesh_lib.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    abstract = state.abstract_state(init_params, tx)
    table = ((r"kernel", ("embed", "mlp")), (r".", ()))
    rules = {"embed": "fsdp", "mlp": "tensor"}
    params = mesh_lib.shardings(abstract["params"], table, rules, mesh)
    placed = state.state_shardings(abstract, params, tx, mesh)
    made = jax.jit(lambda key: state.init_state(init_params, tx, key), out_shardings=placed)(
        jax.random.key(0)
    )
    adam = made["opt_state"][1][0]
    for moment in (adam.mu, adam.nu):
        assert jax.tree.map(lambda x: x.sharding, moment) == params
    assert adam.mu["a"]["kernel"].sharding.spec == P("fsdp", "tensor")
    assert adam.count.sharding.is_fully_replicated
    assert made["step"] == 0


def test_parameters_split_by_their_top_level_key():
    params = {"vit": {"a": 1}, "qformer": {"b": 2}, "temp": 3}
    trainable, frozen = state.split_by_keys(params, ["qformer", "temp"])
    assert trainable == {"qformer": {"b": 2}, "temp": 3}
    assert frozen == {"vit": {"a": 1}}


def test_a_typo_in_what_is_trained_is_an_error():
    with pytest.raises(ValueError, match=r"Cannot train \['qfromer'\].*'qformer', 'vit'"):
        state.split_by_keys({"vit": {}, "qformer": {}}, ["qfromer"])


@pytest.fixture(scope="module")
def tree():
    keys = iter(jax.random.split(jax.random.key(1), 4))
    return {
        "float32": jax.random.normal(next(keys), (8, 16)),
        "bfloat16": jax.random.normal(next(keys), (16, 8), jnp.bfloat16),
        "int32": jax.random.randint(next(keys), (8,), -100, 100),
        "uint8": jnp.arange(16, dtype=jnp.uint8).reshape(2, 8),
        "bool": jnp.arange(8) % 3 == 0,
        "scalar": jnp.float32(0.07),
    }


def test_a_fingerprint_does_not_depend_on_the_mesh(tree):
    prints = {state.fingerprint(tree), state.fingerprint(jax.device_get(tree))}
    for sizes in ({"data": 1, "fsdp": 8, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = mesh_lib.make_mesh(sizes)
        table = ((r"scalar|int32|bool", ()), (r".", ("embed", "mlp")))
        placed = mesh_lib.shardings(tree, table, {"embed": "fsdp", "mlp": "tensor"}, mesh)
        prints.add(state.fingerprint(jax.device_put(tree, placed)))
    assert len(prints) == 1


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int32", "uint8"])
def test_a_fingerprint_sees_a_swap_and_a_single_bit(tree, name):
    before = state.fingerprint(tree)
    values = np.array(tree[name])
    bits = values.reshape(-1).view(f"uint{8 * values.itemsize}")
    assert bits[0] != bits[-1]
    for bit in range(8 * values.itemsize):
        bits[3] ^= np.array(1 << bit, bits.dtype)
        assert state.fingerprint(tree | {name: values}) != before
        bits[3] ^= np.array(1 << bit, bits.dtype)
    assert state.fingerprint(tree | {name: values}) == before
    bits[[0, -1]] = bits[[-1, 0]]
    assert state.fingerprint(tree | {name: values}) != before


def test_a_fingerprint_sees_swaps_of_round_numbers():
    """1.0 and 2.0 differ in high bits only, where a plain product modulo 2**32 is weak."""
    values = np.ones(64, np.float32)
    prints = set()
    for i in range(64):
        values[i] = 2.0
        prints.add(state.fingerprint({"x": values}))
        values[i] = 1.0
    assert len(prints) == 64


def test_a_fingerprint_sees_names_shapes_and_dtypes():
    x = jnp.zeros((2, 3))
    trees = [{"a": x}, {"b": x}, {"a": x.T}, {"a": x.reshape(6)}, {"a": x.astype(jnp.int32)}]
    trees += [{"a": x, "b": x}, {"a": {"b": x}}]
    assert len({state.fingerprint(tree) for tree in trees}) == len(trees)
