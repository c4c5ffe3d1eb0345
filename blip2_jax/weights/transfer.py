"""Tensors of a file into parameters here, and back, by a name table.

Loading first matches names and shapes, from headers alone, and reports every problem at once. Then
each parameter is made on the devices that hold it: a device's piece is cut out of the file,
transposed and cast, and a stack is filled layer by layer. Host memory holds one layer's tensor at a
time, and each process reads only what its own devices hold.
"""

import collections
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from tqdm import tqdm

from blip2_jax.runtime.mesh import flatten_with_names, nested
from blip2_jax.runtime.watchdog import alive
from blip2_jax.weights.files import Tensors, WeightsError
from blip2_jax.weights.rows import KINDS, Row, Table

Leaves = Mapping[str, Any]


SMALL = 32 * 2**20  # bytes of a leaf that the host may hold as a whole


class Piece(NamedTuple):
    """Source of one parameter: the tensors `names`, one a layer, from index `start` on."""

    row: Row
    names: tuple[str, ...]
    start: int


class Plan(NamedTuple):
    """What goes where.

    Attributes:
      pieces: path -> where its values stand.
      copies: tensors that repeat another one, by name.
      left_out: names of tensors that hold nothing we need.
    """

    pieces: dict[str, Piece]
    copies: dict[str, str]
    left_out: tuple[str, ...]


class Problem(NamedTuple):
    """A mismatch: a text with {} in place of a tensor's name, and the name."""

    text: str
    name: str


def _lines(problems: Iterable[Problem]) -> list[str]:
    """One line a kind of tensor: those of all layers are one kind, with a count."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for text, name in problems:
        kinds.setdefault((text, re.sub(r"(?<=\.)\d+(?=\.)", "*", name)), []).append(name)
    return sorted(
        text.format(names[0]) if len(names) == 1 else f"{text.format(kind)} ({len(names)} tensors)"
        for (text, kind), names in kinds.items()
    )


def leaves_of(tree: Any) -> dict[str, Any]:
    """The leaves of nested dicts by path, "a/b/c"."""
    return dict(flatten_with_names(tree))


def _names(row: Row, leaf: Any) -> tuple[str, ...]:
    if not row.stack:
        return (row.theirs,)
    depth = int(np.prod(leaf.shape[: row.stack]))
    return tuple(row.theirs.format(i=k * row.every) for k in range(depth))


def _stored_shapes(row: Row, leaves: Leaves) -> list[tuple[int, ...]]:
    """Shape of each part of a row's tensor, as it is stored; of a part that we lack, its peer's."""
    present = [p for p in row.ours if p is not None]
    shapes = {p: KINDS[row.kind].stored(leaves[p].shape[row.stack :]) for p in present}
    return [shapes[p or present[0]] for p in row.ours]


def plan(table: Table, abstract: Any, tensors: Tensors, *, partial: bool = False) -> Plan:
    """Matches a model with a file: every tensor used once, every parameter filled.

    Args:
      table: the file's names.
      abstract: nested dict of `jax.ShapeDtypeStruct`.
      tensors: the file.
      partial: whether `abstract` may leave out parameters that the file holds.

    Raises:
      WeightsError: everything that does not fit, together.
    """
    leaves = leaves_of(abstract)
    pieces: dict[str, Piece] = {}
    problems: list[Problem] = []
    used: set[str] = set()
    for row in table.rows:
        present = [p for p in row.ours if p is not None]
        absent = [p for p in present if p not in leaves]
        if absent and partial and len(absent) == len(present):
            used.update(n for n in tensors.shapes if _pattern(row).fullmatch(n))
            continue
        if absent:
            # A part of a fused tensor may be missing (no key bias); a missing whole is skipped.
            if len(absent) < len(present):
                problems.append(
                    Problem(
                        f"{', '.join(absent)}: the model lacks it, tensor {{}} holds it", row.theirs
                    )
                )
            continue
        parts = _stored_shapes(row, leaves)
        want = (sum(s[0] for s in parts), *parts[0][1:]) if len(parts) > 1 else parts[0]
        names = _names(row, leaves[present[0]])
        for name in names:
            used.add(name)
            ours = ", ".join(present)
            if name not in tensors.shapes:
                problems.append(Problem(f"{ours}: no tensor {{}}", name))
            elif tensors.shapes[name] != want:
                problem = f"is {list(tensors.shapes[name])}, the model needs {list(want)}"
                problems.append(Problem(f"{ours}: tensor {{}} {problem}", name))
            elif not jnp.issubdtype(tensors.dtypes[name], np.floating):
                problem = (
                    f"is {tensors.dtypes[name]}; quantized weights are not read, take the original"
                )
                problems.append(Problem(f"{ours}: tensor {{}} {problem}", name))
        start = 0
        for path, shape in zip(row.ours, parts, strict=True):
            if path is not None:
                pieces[path] = Piece(row, names, start)
            start += shape[0] if shape else 0
    missing = leaves.keys() - pieces
    problems += [Problem("{}: the name table has no row for it", path) for path in missing]
    rest = tensors.shapes.keys() - used - table.copies.keys()
    dropped = [_of_dropped_layers(row, leaves) for row in table.rows if row.stack]
    ignored = [re.compile(p) for p in table.ignored]
    left_out = {
        name
        for name in rest
        if any(p.fullmatch(name) for p in ignored) or any(f(name) for f in dropped)
    }
    problems += [
        Problem("tensor {}: the model has no parameter for it", name) for name in rest - left_out
    ]
    if problems:
        raise WeightsError(
            f"{tensors.source} does not fit the model:\n  " + "\n  ".join(_lines(problems))
        )
    copies = {name: other for name, other in table.copies.items() if name in tensors.shapes}
    return Plan(pieces, copies, tuple(sorted(left_out)))


def _pattern(row: Row) -> re.Pattern[str]:
    """The names of a row's tensors, of all layers."""
    return re.compile(re.escape(row.theirs).replace(r"\{i\}", r"(\d+)"))


def _of_dropped_layers(row: Row, leaves: Leaves) -> Callable[[str], bool]:
    """Tells whether a name is this row's of a layer that the model drops (an encoder's last)."""
    path = next(p for p in row.ours if p is not None)
    if path not in leaves:
        return lambda name: False
    depth = int(np.prod(leaves[path].shape[: row.stack])) * row.every
    pattern = _pattern(row)

    def dropped(name: str) -> bool:
        match = pattern.fullmatch(name)
        return match is not None and int(match[1]) >= depth

    return dropped


def load(
    table: Table, abstract: Any, tensors: Tensors, *, partial: bool = False, progress: str = ""
) -> Any:
    """Reads a file into the structure, dtypes and shardings of `abstract`.

    Args:
      table: the file's names.
      abstract: nested dict of `jax.ShapeDtypeStruct`, each with a sharding, or with None for
        the default device.
      tensors: the file.
      partial: see `plan`.
      progress: title of a progress bar ("": none).

    Raises:
      WeightsError: everything that does not fit, together, before anything is read; a tensor that
        should repeat another and does not.
    """
    planned = plan(table, abstract, tensors, partial=partial)
    for name, other in planned.copies.items():
        if not np.array_equal(tensors.read(name), tensors.read(other)):
            raise WeightsError(
                f"{tensors.source}: {name} and {other} differ; in this model they are one tensor. "
                "Set tie_word_embeddings to false in its config.json if they should be two."
            )
    leaves = leaves_of(abstract)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())
    loaded = {}
    with tqdm(
        total=size, desc=progress, unit="B", unit_scale=True, disable=not progress or None
    ) as bar:
        for path, leaf in leaves.items():
            loaded[path] = _fill(leaf, planned.pieces[path], tensors)
            bar.update(leaf.size * leaf.dtype.itemsize)
    return nested(loaded)


def _fill(leaf: jax.ShapeDtypeStruct, piece: Piece, tensors: Tensors) -> jax.Array:
    stack = piece.row.stack
    sharding = leaf.sharding or SingleDeviceSharding(jax.devices()[0])
    if not stack:
        return _array(leaf.shape, leaf.dtype, sharding, piece, piece.names[0], tensors)
    inner = _without_stack(sharding, stack)
    if leaf.size * leaf.dtype.itemsize <= SMALL:
        return _small_stack(leaf, sharding, piece, tensors)
    stacked = _empty(leaf.shape, leaf.dtype, sharding)
    for number, name in enumerate(piece.names):
        layer = _array(leaf.shape[stack:], leaf.dtype, inner, piece, name, tensors)
        where = np.unravel_index(number, leaf.shape[:stack])
        stacked = _put(sharding)(stacked, layer, [np.int32(w) for w in where])
    return stacked


def _small_stack(
    leaf: jax.ShapeDtypeStruct, sharding: Sharding, piece: Piece, tensors: Tensors
) -> jax.Array:
    """Layers put together on the host; to compile a program that does it would take longer."""
    depth = leaf.shape[: piece.row.stack]
    shape = leaf.shape[len(depth) :]

    def part(index: Any) -> np.ndarray:  # a slice for each axis
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index[len(depth) :], shape, strict=True))
        layers = [_read(tensors, name, piece, bounds, shape) for name in piece.names]
        stacked = np.stack(layers).astype(leaf.dtype, order="C")
        return stacked.reshape(*depth, *stacked.shape[1:])

    return jax.make_array_from_callback(leaf.shape, sharding, part)


def _without_stack(sharding: Sharding, stack: int) -> Sharding:
    """The same placement for one layer; layers are never spread over devices."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = tuple(sharding.spec)
    if any(spec[:stack]):
        raise ValueError(f"The layers of a stack cannot be sharded, as {sharding.spec} would.")
    return NamedSharding(sharding.mesh, PartitionSpec(*spec[stack:]))


def _empty(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.cache
def _put(sharding: Sharding) -> Callable[..., jax.Array]:
    """Writes one layer into a stack, in place."""

    def put(stacked: jax.Array, layer: jax.Array, where: list[jax.Array]) -> jax.Array:
        layer = layer.reshape((1,) * len(where) + layer.shape)
        return jax.lax.dynamic_update_slice(
            stacked, layer, [*where, *[0] * (layer.ndim - len(where))]
        )

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


def _array(
    shape: tuple[int, ...],
    dtype: Any,
    sharding: Sharding,
    piece: Piece,
    name: str,
    tensors: Tensors,
) -> jax.Array:
    """One layer's parameter, each device's part of it cut out of the file."""
    cut: dict[Any, np.ndarray] = {}  # devices that hold the same part share one reading

    def part(index: Any) -> np.ndarray:  # a slice for each axis
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if bounds not in cut:
            cut[bounds] = _read(tensors, name, piece, bounds, shape).astype(dtype, order="C")
        return cut[bounds]

    return jax.make_array_from_callback(shape, sharding, part)


def _read(
    tensors: Tensors,
    name: str,
    piece: Piece,
    bounds: tuple[tuple[int, int], ...],
    shape: tuple[int, ...],
) -> np.ndarray:
    """ours[bounds] of a tensor; `bounds` are first and last index along each axis, end excluded."""
    alive()
    kind = KINDS[piece.row.kind]
    stored = kind.stored(shape)
    if kind.transposed is None:
        return kind.load(tensors.read(name))[tuple(slice(*b) for b in bounds)]
    index = [slice(*b) for b in (bounds[::-1] if kind.transposed else bounds)]
    if index:
        index[0] = slice(index[0].start + piece.start, index[0].stop + piece.start)
    whole = tensors.shapes[name] == stored and all(
        (s.start, s.stop) == (0, n) for s, n in zip(index, stored, strict=True)
    )
    return kind.load(tensors.read(name, () if whole else tuple(index)))


def tensors_of(table: Table, params: Any, dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file, one at a time, in the table's order.

    Args:
      table: the file's names; rows that this model has no parameter for are skipped.
      params: nested dict of arrays.
      dtype: of the tensors; by default the parameters' own.

    Raises:
      WeightsError: the table has no row for a parameter.
    """
    leaves = leaves_of(params)
    present = [row for row in table.rows if all(p in leaves for p in row.ours if p is not None)]
    missing = leaves.keys() - {p for row in present for p in row.ours}
    if missing:
        raise WeightsError(f"The name table has no row for {', '.join(sorted(missing))}.")
    for row in present:
        kind = KINDS[row.kind]
        first = leaves[next(p for p in row.ours if p is not None)]
        for number, name in enumerate(_names(row, first)):
            where = np.unravel_index(number, first.shape[: row.stack]) if row.stack else ()
            held = [
                None if p is None else kind.save(np.asarray(leaves[p][tuple(where)]))
                for p in row.ours
            ]
            given = next(x for x in held if x is not None)
            parts = [np.zeros_like(given) if x is None else x for x in held]
            array = np.concatenate(parts) if len(parts) > 1 else given
            yield (
                name,
                np.ascontiguousarray(array.astype(dtype or array.dtype)).reshape(array.shape),
            )


def num_bytes(params: Any, dtype: Any = None) -> int:
    """Size of a file of these parameters (tied copies are not written)."""
    leaves = jax.tree.leaves(params)
    return sum(x.size * np.dtype(dtype or x.dtype).itemsize for x in leaves)


def summary(planned: Plan, abstract: Any, depth: int = 2) -> str:
    """A table of what goes where: for each part of the model, tensors and numbers."""
    leaves = leaves_of(abstract)
    tensors: collections.Counter[str] = collections.Counter()
    numbers: collections.Counter[str] = collections.Counter()
    example: dict[str, str] = {}
    for path, piece in planned.pieces.items():
        part = "/".join(path.split("/")[:depth])
        tensors[part] += len(piece.names)
        numbers[part] += leaves[path].size
        example.setdefault(part, piece.row.theirs)
    width = max(map(len, tensors), default=0)
    lines = [
        f"  {part:<{width}}  {tensors[part]:>5} tensors  {numbers[part]:>14,}  {example[part]}"
        for part in tensors
    ]
    if planned.copies:
        lines.append(f"  repeated elsewhere: {', '.join(sorted(planned.copies))}")
    if planned.left_out:
        shown = ", ".join(planned.left_out[:4])
        more = f" and {len(planned.left_out) - 4} more" if len(planned.left_out) > 4 else ""
        lines.append(f"  left out: {shown}{more}")
    return "\n".join(lines)
