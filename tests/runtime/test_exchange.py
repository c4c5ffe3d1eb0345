"""Rows brought from other devices are the rows that were asked for, and their gradients go home."""

import jax
import numpy as np
import pytest

from blip2_jax.runtime import exchange
from blip2_jax.runtime import mesh as mesh_lib

ROWS = 16
RNG = np.random.default_rng(0)
WANTED = {
    "any": RNG.integers(0, ROWS, ROWS),
    "all the same": np.full(ROWS, 5),
    "backwards": np.arange(ROWS)[::-1].copy(),
    "two devices' own": np.where(RNG.random(ROWS) < 0.5, 3, 12),
}


@pytest.mark.parametrize("rows_per_round", [None, 1, 3])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)], ids=str)
def test_rows_brought_are_those_taken_at_once(sizes, rows_per_round):
    """Values bit for bit, gradients too, and no device is ever given the whole."""
    mesh = mesh_lib.make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    place = mesh_lib.batch_sharding(mesh)
    x = jax.device_put(RNG.normal(size=(ROWS, 5, 3)).astype(np.float32), place)
    weights = RNG.normal(size=(ROWS, 5, 3)).astype(np.float32)

    @jax.jit
    def take(x, index):
        return exchange.take_rows(x, index, mesh, rows_per_round=rows_per_round)

    gradient = jax.jit(jax.grad(lambda x, index: (take(x, index) * weights).sum()))
    for index in WANTED.values():
        index = jax.device_put(index.astype(np.int32), place)
        got = take(x, index)
        assert got.sharding.is_equivalent_to(place, got.ndim)
        np.testing.assert_array_equal(got, np.asarray(x)[np.asarray(index)])
        want = np.zeros_like(weights)
        np.add.at(want, np.asarray(index), weights)
        np.testing.assert_allclose(gradient(x, index), want, atol=1e-5)
    for program in (take, gradient):
        text = program.lower(x, index).compile().as_text()
        assert not [line for line in text.splitlines() if "f32" in line and "all-gather(" in line]


def test_bfloat16_rows_keep_their_bits_and_gradients_add_up_in_float32():
    mesh = mesh_lib.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    place = mesh_lib.batch_sharding(mesh)
    x = jax.device_put(RNG.normal(size=(ROWS, 4)), place).astype("bfloat16")
    index = np.full(ROWS, 7, np.int32)
    got, back = jax.vjp(lambda x: exchange.take_rows(x, index, mesh), x)
    np.testing.assert_array_equal(got, np.asarray(x)[index])
    small = jax.device_put(np.full((ROWS, 4), 1 / 256), place).astype("bfloat16")
    small = small.at[0].set(1.0)
    total = np.asarray(back(small)[0], np.float32)
    np.testing.assert_array_equal(total[7], np.float32(1 + 15 / 256).astype(small.dtype))
    assert not total[:7].any() and not total[8:].any()
