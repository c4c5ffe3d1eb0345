"""Rows brought from other devices are the rows that were asked for, and their gradients go home."""

import jax
import jax.numpy as jnp
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


def ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """XLA's, from its documentation, out of operations that a CPU has."""
    here = jax.lax.axis_index(axis_name)

    def all_of(x):
        return jax.lax.all_gather(x, axis_name)

    operands, offsets, sizes, arrivals = map(
        all_of, (operand, input_offsets, send_sizes, output_offsets)
    )
    position = jnp.arange(len(output))
    for sender in range(len(operands)):
        offset = position - arrivals[sender, here]
        sent = operands[sender][jnp.clip(offsets[sender, here] + offset, 0, len(operand) - 1)]
        comes = (offset >= 0) & (offset < sizes[sender, here])
        output = jnp.where(comes.reshape(-1, *[1] * (output.ndim - 1)), sent, output)
    received = sizes[:, here]
    return jnp.where((received == recv_sizes).all(), output, jnp.nan)


@pytest.fixture
def ragged(monkeypatch):
    """The way of chips whose XLA has the operation."""
    monkeypatch.setattr(exchange, "RING_ONLY", ("none of these",))
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)


MESHES = [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_rows_taken_in_a_ring_are_those_taken_at_once(sizes):
    """And no device is ever given the whole."""
    take, gradient, arguments = check(sizes)
    for program in (take, gradient):
        text = program.lower(*arguments).compile().as_text()
        gathers = [line for line in text.splitlines() if "all-gather(" in line]
        assert not [line for line in gathers if "f32" in line]  # of the index alone


@pytest.mark.usefixtures("ragged")
@pytest.mark.parametrize("rows_per_round", [None, 1, 3])
@pytest.mark.parametrize("sizes", MESHES[1:3], ids=str)
def test_rows_taken_in_rounds_are_those_taken_at_once(sizes, rows_per_round):
    check(sizes, rows_per_round=rows_per_round)


def check(sizes, **options):
    """Values bit for bit, and gradients."""
    mesh = mesh_lib.make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    sharding = mesh_lib.batch_sharding(mesh)
    x = jax.device_put(RNG.normal(size=(ROWS, 5, 3)).astype(np.float32), sharding)
    weights = RNG.normal(size=(ROWS, 5, 3)).astype(np.float32)

    @jax.jit
    def take(x, index):
        return exchange.take_rows(x, index, mesh, **options)

    gradient = jax.jit(jax.grad(lambda x, index: (take(x, index) * weights).sum()))
    for index in WANTED.values():
        index = jax.device_put(index.astype(np.int32), sharding)
        got = take(x, index)
        assert got.sharding.is_equivalent_to(sharding, got.ndim)
        np.testing.assert_array_equal(got, np.asarray(x)[np.asarray(index)])
        want = np.zeros_like(weights)
        np.add.at(want, np.asarray(index), weights)
        np.testing.assert_allclose(gradient(x, index), want, atol=1e-5)
    return take, gradient, (x, index)


@pytest.mark.usefixtures("ragged")
def test_gradients_of_a_row_that_many_want_add_up_in_float32():
    mesh = mesh_lib.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    sharding = mesh_lib.batch_sharding(mesh)
    x = jax.device_put(RNG.normal(size=(ROWS, 4)), sharding).astype("bfloat16")
    index = np.full(ROWS, 7, np.int32)
    got, back = jax.vjp(lambda x: exchange.take_rows(x, index, mesh), x)
    np.testing.assert_array_equal(got, np.asarray(x)[index])
    small = jax.device_put(np.full((ROWS, 4), 1 / 256), sharding).astype("bfloat16")
    total = np.asarray(back(small.at[0].set(1.0))[0], np.float32)
    np.testing.assert_array_equal(total[7], np.float32(1 + 15 / 256).astype(small.dtype))
    assert not total[:7].any() and not total[8:].any()
