"""The device mesh, and the sharding of every array on it.

Three mesh axes, always present: `data` (the batch only; the slow network between TPU slices goes
here), `fsdp` (the batch and the parameters) and `tensor` (the parameters only). A parameter is
placed in two steps, so that models never mention hardware:

    "qformer/layers/mlp/up/kernel"  --table of the model-->  ("embed", "mlp")
                                    --rules of the config--> ("fsdp", "tensor")

This module must not know which parameters exist.
"""

import collections
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

AxesTable = Sequence[tuple[str, Sequence[str | None]]]
Rules = Mapping[str, str | Sequence[str] | None]


def make_mesh(config_mesh: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh from its sizes.

    Args:
      config_mesh: sizes by axis name, e.g. `{"data": 1, "fsdp": -1, "tensor": 1}`; a -1, allowed
        once, takes all the devices that the others leave.
      devices: the devices to use; all of them when None. `blip2 plan` passes those of a slice that
        is not there.

    Returns:
      A mesh over ("data", "fsdp", "tensor") in which XLA places what we do not (`AxisType.Auto`).

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `data` is not a multiple
        of the number of TPU slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(config_mesh, len(devices))
    grid = _grid(sizes, _num_slices(devices), devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(config_mesh: Mapping[str, int], num_devices: int) -> tuple[int, ...]:
    """The three axis sizes, with the -1 filled in."""
    sizes = dict(config_mesh)
    if sorted(sizes) != sorted(AXES):
        raise ValueError(
            f"config.mesh has the keys {sorted(sizes)}; it needs exactly {list(AXES)}."
        )
    free = [name for name, size in sizes.items() if size == -1]
    bad = {name: size for name, size in sizes.items() if size != -1 and size < 1}
    if bad or len(free) > 1:
        raise ValueError(
            f"config.mesh is {sizes}: each size is a positive number, and at most one is -1 "
            "(= the devices that are left)."
        )
    given = math.prod(size for size in sizes.values() if size != -1)
    if num_devices % given or (not free and given != num_devices):
        raise ValueError(
            f"config.mesh is {sizes}, which asks for {'a multiple of ' if free else ''}{given} "
            f"devices, but there are {num_devices}. Change --config.mesh.data, .fsdp or .tensor "
            f"so that they multiply to {num_devices}; -1 takes what is left."
        )
    for name in free:
        sizes[name] = num_devices // given
    return tuple(sizes[name] for name in AXES)


def _num_slices(devices: Sequence[Any]) -> int:
    # Only TPU slices: GPUs and CPUs have a `slice_index` too, but their hosts are no slices.
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def _grid(sizes: tuple[int, ...], num_slices: int, devices: Sequence[Any]) -> np.ndarray:
    """A grid of devices in which only the `data` axis crosses from one slice to another.

    A mesh axis may take a part of an axis of the torus: 16 chips of a v6e-64, which is 8 by 8.
    """
    data, fsdp, tensor = sizes
    if data % num_slices:
        raise ValueError(
            f"The devices are {num_slices} TPU slices and config.mesh.data is {data}. Only `data` "
            f"may cross slices: set --config.mesh.data={num_slices} (or a multiple of it)."
        )
    if num_slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    within_slice = (data // num_slices, fsdp, tensor)
    return mesh_utils.create_hybrid_device_mesh(
        within_slice, (num_slices, 1, 1), devices, allow_split_physical_axes=True
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension of a batch is split over `data` and `fsdp`; the rest is whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_rows(mesh: Mesh, batch_size: int, devices: Sequence[Any] | None = None) -> list[int]:
    """The rows of a global batch that a process loads: those its devices hold, in order.

    They follow from `batch_sharding` alone, so row k of the batch is the same record on every mesh
    and for any number of processes. They need not be adjacent, and where a part of the
    batch is on devices of several processes, each of these loads it.

    Args:
      mesh: the mesh.
      batch_size: rows of the global batch.
      devices: the process's; None: this process's own.

    Raises:
      ValueError: the batch does not divide over the mesh.
    """
    shards = num_batch_shards(mesh)
    if batch_size % shards:
        raise ValueError(
            f"A batch of {batch_size} does not divide over the {shards} devices of the mesh's data "
            "and fsdp axes; take a multiple."
        )
    sharding = batch_sharding(mesh)
    own = sharding.addressable_devices if devices is None else set(devices)
    parts = sharding.devices_indices_map((batch_size,))
    return sorted({row for device in own for row in range(batch_size)[parts[device][0]]})


def global_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int
) -> dict[str, jax.Array]:
    """Makes one global array of each process's rows.

    Args:
      batch: this process's rows, those of `local_rows`, `[b, ...]` each.
      mesh: the mesh.
      batch_size: rows of the global batch, B.

    Returns:
      The same keys with arrays `[B, ...]`, laid out as `batch_sharding`.
    """
    sharding = batch_sharding(mesh)
    local_index = {row: number for number, row in enumerate(local_rows(mesh, batch_size))}

    def put(local: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:  # a slice for each axis
            first, stop, _ = index[0].indices(batch_size)
            begin = local_index[first]
            return local[begin : begin + stop - first]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, part)

    return {key: put(np.asarray(local)) for key, local in batch.items()}


def num_batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


class Placement(NamedTuple):
    """The sharding of one leaf. `notes` says which rules could not be followed."""

    path: str
    shape: tuple[int, ...]
    num_bytes: int
    spec: PartitionSpec
    notes: tuple[str, ...]


def shardings(abstract_tree: Any, axes_table: AxesTable, rules: Rules, mesh: Mesh) -> Any:
    """The `NamedSharding` of every leaf of a tree.

    Args:
      abstract_tree: a tree of arrays or `jax.ShapeDtypeStruct`s.
      axes_table: `((path_regex, names), ...)`. The first regex that `re.search` finds in a leaf's
        path ("a/b/c") decides. `names` are right-aligned: they name the trailing dimensions, so a
        stacked layer axis in front needs no entry; None and unnamed dimensions are not split.
      rules: logical name -> mesh axis (or several, or None = not split).
      mesh: the mesh.

    Returns:
      The same tree with a `NamedSharding` at each leaf. A dimension that its mesh axis does not
      divide is kept whole, with one line in the log; `placement_summary` shows them all.

    Raises:
      ValueError: leaves that no row covers (all are listed), a name without a rule, a rule with an
        unknown mesh axis, or more names than dimensions.
    """
    placements = placements_of(abstract_tree, axes_table, rules, mesh)
    for placement in placements:
        for note in placement.notes:
            log.warning("%s %s: %s", placement.path, list(placement.shape), note)
    leaves = [NamedSharding(mesh, placement.spec) for placement in placements]
    return jax.tree.unflatten(jax.tree.structure(abstract_tree), leaves)


def placements_of(
    abstract_tree: Any, axes_table: AxesTable, rules: Rules, mesh: Mesh
) -> list[Placement]:
    """The sharding of each leaf; see `shardings` for arguments and errors."""
    _check_rules(axes_table, rules, mesh)
    compiled = [(re.compile(pattern), tuple(names)) for pattern, names in axes_table]
    placements, uncovered = [], []
    for path, leaf in flatten_with_names(abstract_tree):
        names = next((names for pattern, names in compiled if pattern.search(path)), None)
        if names is None:
            uncovered.append(f"  {path} {list(leaf.shape)}")
            continue
        if len(names) > len(leaf.shape):
            raise ValueError(
                f"{path} has {len(leaf.shape)} dimensions {list(leaf.shape)}, but its row in the "
                f"table of axes names {len(names)}: {names}."
            )
        names = (None,) * (len(leaf.shape) - len(names)) + names
        spec, notes = _spec(names, leaf.shape, rules, mesh)
        num_bytes = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        placements.append(Placement(path, tuple(leaf.shape), num_bytes, spec, notes))
    if uncovered:
        raise ValueError(
            f"No row of the table of axes covers {len(uncovered)} parameters; add them to the "
            "table next to their model:\n" + "\n".join(uncovered)
        )
    return placements


def _check_rules(axes_table: AxesTable, rules: Rules, mesh: Mesh) -> None:
    names = {name for _, row in axes_table for name in row if name is not None}
    missing = sorted(names - set(rules))
    if missing:
        raise ValueError(
            f"No rule for the axis names {missing}; give each a mesh axis or None in the "
            f"sharding rules. There are rules for {sorted(rules)}."
        )
    for name, target in rules.items():
        for axis in _mesh_axes(target):
            if axis not in mesh.axis_names:
                raise ValueError(
                    f"The sharding rule {name!r} -> {axis!r} names no mesh axis; "
                    f"there are {list(mesh.axis_names)}."
                )


def _mesh_axes(target: str | Sequence[str] | None) -> tuple[str, ...]:
    if target is None:
        return ()
    return (target,) if isinstance(target, str) else tuple(target)


def _spec(
    names: tuple[str | None, ...], shape: tuple[int, ...], rules: Rules, mesh: Mesh
) -> tuple[PartitionSpec, tuple[str, ...]]:
    """One leaf's partition, leaving whole what cannot be split."""
    spec: list[Any] = []
    notes: list[str] = []
    used: set[str] = set()
    for dim, name in zip(shape, names, strict=True):
        axes = () if name is None else _mesh_axes(rules[name])
        ways = math.prod(mesh.shape[axis] for axis in axes)
        if dim % ways:
            notes.append(f"{name}={dim} is not divisible by {'*'.join(axes)}={ways}, kept whole")
            axes = ()
        elif used.intersection(axes):
            # Two dimensions cannot share a mesh axis; the leading one has it.
            if ways > 1:
                notes.append(f"{name}={dim} is kept whole, {'*'.join(axes)} splits another axis")
            axes = ()
        used.update(axes)
        spec.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*spec), tuple(notes)


def placement_summary(placements: Sequence[Placement], mesh: Mesh) -> str:
    """A few lines for the log: bytes in all, bytes on a device, and what could not be split."""
    total = sum(p.num_bytes for p in placements)
    local = 0
    whole: collections.Counter[str] = collections.Counter()
    for p in placements:
        ways = math.prod(mesh.shape[a] for entry in p.spec for a in _mesh_axes(entry))
        local += p.num_bytes // ways
        if ways == 1:
            whole[p.path] = p.num_bytes
    share = 100 * whole.total() / max(total, 1)
    lines = [
        f"mesh {dict(mesh.shape)}: {len(placements)} arrays, {total / 2**20:.1f} MiB in all, "
        f"{local / 2**20:.1f} MiB on each device; {share:.1f} % of the bytes are on every device"
    ]
    lines += [f"  {p.path} {list(p.shape)}: {note}" for p in placements for note in p.notes]
    return "\n".join(lines)


def bytes_per_device(abstract_tree: Any) -> int:
    """What a device holds of a tree of arrays, or of `jax.ShapeDtypeStruct`s with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(abstract_tree)
    )


def flatten_with_names(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree with their paths, written "a/b/c"."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `flatten_with_names`: {"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        holder = tree
        for parent in parents:
            holder = holder.setdefault(parent, {})
        holder[name] = leaf
    return tree
