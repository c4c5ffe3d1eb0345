"""`x[index]` along the sharded dimension of a batch, by ragged all-to-all.

Left to itself, XLA gathers the whole batch on every device. Here each device receives its own
share of the rows and no more, however many devices there are. A row may be wanted by any number of
devices, so what a device must send is known only at run time: rows are sent in rounds of a fixed
size (one or two, as a rule). Where XLA has no ragged all-to-all, all rows go round in a ring.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from blip2_jax.runtime.mesh import BATCH_AXES, num_batch_shards

# Where XLA has no ragged all-to-all: on CPUs, and on v5e ("not supported in limited ICI routing
# settings" beyond 16 chips, libtpu 0.0.42).
RING_ONLY = ("cpu", "TPU v5 lite", "TPU v5e")


def take_rows(
    x: jax.Array, index: jax.Array, mesh: Mesh, *, rows_per_round: int | None = None
) -> jax.Array:
    """`x[index]` along the batch, without the whole of x on any device.

    Args:
      x: [B, ...], laid out as `mesh.batch_sharding`.
      index: int32[B], rows of the global batch.
      mesh: the mesh.
      rows_per_round: how many rows a device sends in a round; None: twice its own, or 32. It
        bounds the memory, and does not change the result.

    Returns:
      [B, ...], laid out as x. Differentiable in x.
    """
    shards = num_batch_shards(mesh)
    if shards == 1:
        return x[index]
    local_rows = len(x) // shards
    rows_per_round = rows_per_round or max(2 * local_rows, 32)
    batch = PartitionSpec(BATCH_AXES)

    def on_devices(
        function: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, index: jax.Array
    ) -> jax.Array:
        specs = (batch, PartitionSpec())
        run = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=batch, check_vma=False)
        return run(x, index)

    if mesh.devices.flat[0].device_kind.startswith(RING_ONLY):
        return on_devices(functools.partial(_pass_round, shards=shards), x, index)
    send = functools.partial(_send_rows, rows_per_round=rows_per_round)
    send_back = functools.partial(_return_rows, rows_per_round=rows_per_round)

    @jax.custom_vjp
    def take(x: jax.Array, index: jax.Array) -> jax.Array:
        return forward(x, index)[0]

    def forward(x: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        return on_devices(send, x, index), index

    def backward(index: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
        return on_devices(send_back, gradient, index), None

    take.defvjp(forward, backward)
    return take(x, index)


def _pass_round(x: jax.Array, index: jax.Array, *, shards: int) -> jax.Array:
    """Sends the parts of x round a ring; each device keeps the rows that it wants.

    One part more than its own is all that a device ever holds, but the bytes it passes on are in
    proportion to the number of devices.
    """
    here, local_rows = jax.lax.axis_index(BATCH_AXES), len(x)
    wanted = jax.lax.dynamic_slice_in_dim(index, here * local_rows, local_rows)
    onward = [(i, (i + 1) % shards) for i in range(shards)]

    def step(
        carry: tuple[jax.Array, jax.Array], turn: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        passing, taken = carry
        at = wanted - (here - turn) % shards * local_rows  # index in the part that is passing
        present = ((at >= 0) & (at < local_rows)).reshape(-1, *[1] * (x.ndim - 1))
        taken = jnp.where(present, passing[jnp.clip(at, 0, local_rows - 1)], taken)
        return (jax.lax.ppermute(passing, BATCH_AXES, onward), taken), None

    (_, taken), _ = jax.lax.scan(step, (x, jnp.zeros_like(x)), jnp.arange(shards))
    return taken


def _send_rows(x: jax.Array, index: jax.Array, *, rows_per_round: int) -> jax.Array:
    """This device's part of x -> the rows that it wants, in the order it wants them."""
    traffic = _Traffic.of(index, len(x), rows_per_round)

    def send(number: jax.Array, arrived: jax.Array) -> jax.Array:
        moved = traffic.round(number)
        return _ragged_all_to_all(
            x[moved.sent_rows],
            arrived,
            moved.index_in_round,
            moved.count,
            moved.index_on_arrival,
        )

    arrived = jax.lax.fori_loop(0, traffic.rounds, send, jnp.zeros_like(x))
    return jnp.zeros_like(x).at[traffic.arrivals].set(arrived, unique_indices=True)


def _return_rows(gradient: jax.Array, index: jax.Array, *, rows_per_round: int) -> jax.Array:
    """The transpose of `_send_rows`: gradients of rows are sent back and added up."""
    traffic = _Traffic.of(index, len(gradient), rows_per_round)
    leaving = gradient[traffic.arrivals]

    def send(number: jax.Array, total: jax.Array) -> jax.Array:
        moved = traffic.round(number)
        home = jnp.zeros((rows_per_round, *gradient.shape[1:]), gradient.dtype)
        home = _ragged_all_to_all(
            leaving,
            home,
            moved.index_on_arrival.T,
            moved.count.T,
            moved.index_in_round.T,
        )
        return total.at[moved.sent_rows].add(home.astype(total.dtype))  # beyond the round's: zeros

    total = jnp.zeros(gradient.shape, jnp.float32)
    return jax.lax.fori_loop(0, traffic.rounds, send, total).astype(gradient.dtype)


@dataclasses.dataclass(frozen=True)
class _Round:
    """What travels in one round. Matrices are int32[shards, shards], [from, to].

    Attributes:
      sent_rows: int32[rows_per_round], this device's rows that it sends, in order of the device
        that wants them; what is left over is row 0.
      count: how many rows travel.
      index_in_round: where they begin among the `sent_rows` of the device they come from.
      index_on_arrival: where they begin among all that arrives at the device they go to.
    """

    sent_rows: jax.Array
    count: jax.Array
    index_in_round: jax.Array
    index_on_arrival: jax.Array


@dataclasses.dataclass(frozen=True)
class _Traffic:
    """Who sends what to whom: the same on all devices, which all see the whole index.

    A device's outgoing rows are in order of the device that wants them, then of where it wants
    them; the incoming ones in order of where they come from, then of where they are wanted.

    Attributes:
      index: int32[shards, local rows], the rows of the whole batch that each device wants.
      count: int32[shards, shards], rows that go [from, to].
      first_sent, first_arrived: int32[shards, shards], where these begin among all that leaves
        the one and all that arrives at the other.
      arrivals: int32[local rows], where on this device each row that arrives is wanted.
      rounds: int32[], as many as the busiest device needs.
      rows_per_round: see `take_rows`.
    """

    index: jax.Array
    count: jax.Array
    first_sent: jax.Array
    first_arrived: jax.Array
    arrivals: jax.Array
    rounds: jax.Array
    rows_per_round: int

    @classmethod
    def of(cls, index: jax.Array, local_rows: int, rows_per_round: int) -> "_Traffic":
        index = index.reshape(-1, local_rows)
        home = index // local_rows
        wanted_from = jax.vmap(functools.partial(jnp.bincount, length=len(index)))(home)
        count = wanted_from.T.astype(jnp.int32)

        def sum_before(x: jax.Array, axis: int) -> jax.Array:
            return jnp.cumsum(x, axis) - x

        return cls(
            index=index,
            count=count,
            first_sent=sum_before(count, 1),
            first_arrived=sum_before(count, 0),
            arrivals=jnp.argsort(home[jax.lax.axis_index(BATCH_AXES)], stable=True),
            rounds=-(-count.sum(axis=1).max() // rows_per_round),
            rows_per_round=rows_per_round,
        )

    def round(self, number: jax.Array) -> _Round:
        """The number-th `rows_per_round` of each device's outgoing rows."""
        size, local_rows = self.rows_per_round, self.index.shape[1]
        here = jax.lax.axis_index(BATCH_AXES)
        begin, end = number * size, (number + 1) * size
        mine = (self.index // local_rows == here).ravel()
        order = jnp.cumsum(mine) - 1
        (wanted,) = jnp.nonzero(mine & (order >= begin) & (order < end), size=size, fill_value=-1)
        sent_rows = jnp.where(wanted >= 0, self.index.ravel()[wanted] % local_rows, 0)
        first = jnp.clip(self.first_sent, begin, end)
        last = jnp.clip(self.first_sent + self.count, begin, end)
        arrival = self.first_arrived + first - self.first_sent
        return _Round(sent_rows, last - first, first - begin, arrival)


def _ragged_all_to_all(
    x: jax.Array, into: jax.Array, begin: jax.Array, count: jax.Array, target: jax.Array
) -> jax.Array:
    """Sends `count[i, j]` rows of device i, from `begin[i, j]`, to `target[i, j]` in j's `into`."""
    here = jax.lax.axis_index(BATCH_AXES)
    sent = (begin[here], count[here], target[here])
    return jax.lax.ragged_all_to_all(x, into, *sent, count[:, here], axis_name=BATCH_AXES)
