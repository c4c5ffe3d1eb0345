"""What a compiled program does, read from its text: collectives and matrix products.

XLA's own `cost_analysis` counts the body of a loop once. Here everything counts as often as it
runs: a scan over 39 layers counts 39 times. A loop whose number of trips is decided at run time
counts once; there is one, the rounds of `exchange.take_rows`, which all together move what one
round has room for.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from blip2_jax.planning.hlo_text import (
    ARRAY,
    Computation,
    Op,
    dims_of,
    find,
    num_bytes,
    parse,
)


class Collective(NamedTuple):
    """One collective of a program, with all the times that a step runs it.

    Attributes:
      kind: "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all" or
        "collective-permute".
      axes: the mesh axes along which data moves.
      devices: that take part in each group.
      times: how often a step runs it.
      sent: bytes that a chip sends in a step, on average, by a ring.
      crosses_slices: whether they go through the network between slices.
      name: the operation of the model that it belongs to.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    times: int
    sent: float
    crosses_slices: bool
    name: str


class Program(NamedTuple):
    """What one chip does in one run of a program.

    Attributes:
      collectives: each one.
      flops: of matrix products.
      open_loops: loops whose trips are decided at run time, counted once.
    """

    collectives: list[Collective]
    flops: float
    open_loops: int


def read(text: str, mesh_shape: Mapping[str, int], num_slices: int = 1) -> Program:
    """Reads a compiled program.

    Args:
      text: of `jax.stages.Compiled.as_text()`.
      mesh_shape: axis name -> size, in the order of the mesh's axes.
      num_slices: TPU slices, which the first axis crosses. The program is one slice's then; what
        passes between slices is sent by the host.
    """
    first, *others = mesh_shape.items()
    mesh_shape = {first[0]: first[1] // num_slices, **dict(others)}
    computations, entry = parse(text)
    starts = _starts(computations)
    started = {channel for channels in starts.values() for channel in channels}
    collectives: dict[tuple[str, str, str], Collective] = {}
    flops, open_loops = 0.0, 0
    for run in _walk(computations, entry, 1, entry):
        for op in computations[run.name].values():
            if op.opcode == "while" and run.open_loop(op):
                open_loops += 1
            elif op.opcode in ("convolution", "dot"):
                flops += run.times * _matmul_flops(op, computations[run.name])
            elif collective := _collective(op, computations[run.name], run, mesh_shape, num_slices):
                channel = _channel(op)
                if channel in started and channel not in starts.get(run.name, ()):
                    continue  # a piece of one that was started elsewhere
                key = (run.inside, collective.kind, channel or op.name)
                collectives.setdefault(key, collective)
    return Program(list(collectives.values()), flops, open_loops)


def _channel(op: Op) -> str:
    match = re.search(r"channel_id=(\d+)", op.attributes)
    return match.group(1) if match else ""


def _starts(computations: Mapping[str, Computation]) -> dict[str, set[str]]:
    """Computations that set an asynchronous collective going -> the channels they use.

    On TPUs a collective goes on in pieces, each fused with other work and possibly in another loop,
    and each piece is written as the whole collective, with its channel. Only the start counts.
    """
    return {
        name: {_channel(op) for op in ops.values() if op.opcode in KINDS}
        for name, ops in computations.items()
        if any("AsyncCollectiveStart" in op.attributes for op in ops.values())
    }


# ------------------------------------------------------------------------------ what is run


class _Run(NamedTuple):
    """A computation that runs `times` in a step; `inside` is the call that it is fused into."""

    name: str
    times: int
    inside: str
    trips: Mapping[str, int | None]

    def open_loop(self, loop: Op) -> bool:
        return self.trips[loop.name] is None


def _walk(
    computations: Mapping[str, Computation], name: str, times: int, inside: str
) -> Iterator[_Run]:
    """Every computation that runs, as often as it is called; of a condition, all branches."""
    ops = computations[name]
    loops = [op for op in ops.values() if op.opcode == "while"]
    trips = {op.name: _trips(op, ops, computations) for op in loops}
    yield _Run(name, times, inside, trips)
    for op in ops.values():
        own = f"{inside}/{op.name}"
        if op.opcode == "while":
            count = trips[op.name]
            times_in_all = times * (1 if count is None else count)
            yield from _walk(computations, op.called("body"), times_in_all, own)
        elif op.opcode == "conditional":
            for branch in re.findall(r"%([\w.\-]+)", op.attributes.partition("metadata")[0]):
                if branch in computations:
                    yield from _walk(computations, branch, times, own)
        elif called := op.called("calls") or (op.opcode == "call" and op.called("to_apply")):
            yield from _walk(computations, called, times, own if op.opcode == "call" else inside)


def _trips(loop: Op, ops: Computation, computations: Mapping[str, Computation]) -> int | None:
    """How often a counted loop runs; None where that is decided at run time."""
    condition = computations[loop.called("condition")]
    body = computations[loop.called("body")]
    test = next(op for op in condition.values() if op.root)
    test, condition = _unfused(test, condition, computations)
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    start = ops.get(loop.operands[0])

    def initially(index: int) -> int | None:
        if start is None or start.opcode != "tuple":
            return None
        return _constant(start.operands[index], ops)

    counter = _element(test.operands[0], condition)
    limit = _constant(test.operands[1], condition)
    if limit is None and (index := _element(test.operands[1], condition)) is not None:
        limit = initially(index)
    if counter is None or limit is None:
        return None
    first = initially(counter)
    root = next(op for op in body.values() if op.root)
    step = None
    if root.opcode == "tuple":
        step = _step(root.operands[counter], counter, body, computations)
    if first is None or not step:
        return None
    return max(0, math.ceil((limit - first) / step))


def _unfused(
    op: Op, ops: Computation, computations: Mapping[str, Computation]
) -> tuple[Op, Computation]:
    """The root of a fusion in place of the fusion, its parameters being the fusion's operands."""
    if op.opcode != "fusion":
        return op, ops
    inner = dict(computations[op.called("calls")])
    for name, part in list(inner.items()):
        if part.opcode == "parameter":
            inner[name] = dataclasses.replace(
                part, opcode="copy", operands=(op.operands[int(part.argument)],)
            )
    root = next(part for part in inner.values() if part.root)
    return root, {**ops, **inner}


def _source(name: str, ops: Computation) -> Op | None:
    """Through what changes no value."""
    op = ops.get(name)
    while op is not None and op.opcode in ("copy", "bitcast", "convert", "reshape"):
        op = ops.get(op.operands[0])
    return op


def _element(name: str, ops: Computation) -> int | None:
    """The index in the loop's tuple, of what is taken from it."""
    op = _source(name, ops)
    if op is None or op.opcode != "get-tuple-element":
        return None
    match = re.search(r"index=(\d+)", op.attributes)
    return int(match.group(1)) if match else None


def _constant(name: str, ops: Computation) -> int | None:
    op = _source(name, ops)
    if op is not None and op.opcode == "constant" and re.fullmatch(r"-?\d+", op.argument):
        return int(op.argument)
    return None


def _step(
    name: str, counter: int, ops: Computation, computations: Mapping[str, Computation]
) -> int | None:
    """What a turn of the loop adds to its counter."""
    op = _source(name, ops)
    if op is None:
        return None
    op, ops = _unfused(op, ops, computations)
    if op.opcode != "add":
        return None
    for here, other in (op.operands, op.operands[::-1]):
        if _element(here, ops) == counter:
            return _constant(other, ops)
    return None


# --------------------------------------------------------------------------- matrix products


def _matmul_flops(op: Op, ops: Computation) -> float:
    """Two a multiplication. TPU programs write all products as convolutions."""
    left, right = (dims_of(find(ARRAY, ops[name].shape)[2]) for name in op.operands[:2])
    out = dims_of(find(ARRAY, op.shape)[2])
    if op.opcode == "dot":
        match = find(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
        return 2.0 * math.prod(out) * math.prod([left[i] for i in dims_of(match[1])])
    labels = find(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    of_left, of_right, of_out = labels.groups()
    inputs = right[of_right.index("i")]
    flops = 2.0 * out[of_out.index("b")] * out[of_out.index("f")] * inputs
    for number, axis in enumerate(axis for axis in sorted(of_out) if axis.isdigit()):
        flops *= _taps(
            left[of_left.index(axis)],
            right[of_right.index(axis)],
            out[of_out.index(axis)],
            _window(op.attributes, number),
        )
    return flops


def _window(attributes: str, number: int) -> dict[str, int]:
    """Stride, dilations and low padding of one spatial axis."""
    window = find(r"window=\{([^}]*)\}", attributes)
    fields = dict(re.findall(r"(\S+?)=(\S+)", window[1]))

    def pick(key: str, default: str) -> str:
        return fields[key].split("x")[number] if key in fields else default

    return {
        "stride": int(pick("stride", "1")),
        "low": int(pick("pad", "0_0").split("_")[0]),
        "lhs": int(pick("lhs_dilate", "1")),
        "rhs": int(pick("rhs_dilate", "1")),
    }


def _taps(size: int, kernel: int, out: int, window: Mapping[str, int]) -> int:
    """Pairs (output, kernel position) that meet an element, not padding or a hole of dilation.

    A batched product is written as a convolution in which each output meets exactly one.
    """
    index = np.arange(out)[:, None] * window["stride"] - window["low"]
    index = index + np.arange(kernel)[None, :] * window["rhs"]
    inside = (index >= 0) & (index <= (size - 1) * window["lhs"]) & (index % window["lhs"] == 0)
    return int(inside.sum())


# ------------------------------------------------------------------------------- collectives

KINDS = (
    "ragged-all-to-all", "all-gather", "all-reduce", "reduce-scatter", "all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip


def _collective(
    op: Op, ops: Computation, run: _Run, mesh_shape: Mapping[str, int], num_slices: int
) -> Collective | None:
    kind = op.opcode.removesuffix("-start")
    axes: tuple[str, ...]
    sizes = [num_bytes(ops[name].shape) for name in op.operands]
    between = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.attributes)
    if kind == "send" and between:
        kind, size = between.group(1).lower().replace("_", "-"), num_slices
        axes = (next(iter(mesh_shape)),)
        sizes = sizes[:1]  # the other operand is a token
    elif kind in KINDS:
        members, size = _groups(op.attributes, math.prod(mesh_shape.values()))
        coordinates = np.unravel_index(members, tuple(mesh_shape.values()))
        axes = tuple(
            name for name, at in zip(mesh_shape, coordinates, strict=True) if len(np.unique(at)) > 1
        )
    else:
        return None
    if size == 1:
        return None  # a group of one device sends nothing
    # Gradients are summed and split in one: XLA for TPU writes it as a fusion of an all-reduce.
    if kind == "all-reduce" and "all-reduce-scatter" in run.name:
        kind = "reduce-scatter"
    once = {
        "all-gather": sum(sizes) * (size - 1),
        "all-reduce": 2 * sum(sizes) * (size - 1) / size,
        # What a chip sends is what it holds: its rows, of which the round may have room for more.
        "ragged-all-to-all": min(sizes[:2], default=0) * (size - 1) / size,
        "collective-permute": sum(sizes),
    }.get(kind, sum(sizes) * (size - 1) / size)
    named = re.search(r'op_name="([^"]*)"', op.attributes)
    return Collective(
        kind=kind,
        axes=axes,
        devices=size,
        times=run.times,
        sent=once * run.times,
        crosses_slices=bool(between),
        name=named.group(1) if named else "",
    )


def _groups(attributes: str, devices: int) -> tuple[list[int], int]:
    """Members of one group, and how many there are; of a permutation, a sender and receiver."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        moving = [(int(a), int(b)) for a, b in re.findall(r"(\d+),(\d+)", pairs.group(1)) if a != b]
        if not moving:
            return [], 1
        return list(moving[0]), len({device for pair in moving for device in pair})
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        members = dims_of(listed.group(1))
        return members, len(members)
    if iota := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        shape, of, order = iota.groups()
        ids = np.arange(devices).reshape(dims_of(of))
        ids = ids.transpose(dims_of(order)) if order else ids
        members = ids.reshape(dims_of(shape))[0].tolist()
        return members, len(members)
    if named := re.search(r"replica_groups=mesh\[(.*?)\](.*?)\{([^}]*)\}", attributes):
        return _named_group(named[1], named[2], named[3], devices)
    if "replica_groups={}" in attributes:
        return list(range(devices)), devices
    raise ValueError(f"Replica groups that are not known: {attributes[:200]}")


def _named_group(axes: str, order: str, over: str, devices: int) -> tuple[list[int], int]:
    """Groups as axes of a mesh of the compiler's own: mesh['a'=2,'b'=8] {'b'}, also 'b':(2)4."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    ids = np.arange(devices)
    if given := re.search(r"device_ids=\(?\[([\d,]+)\](?:<=\[([\d,]+)\])?T?\(?([\d,]+)?", order):
        shape, of, transposed = given.groups()
        ids = ids.reshape(dims_of(of or shape))
        ids = ids.transpose(dims_of(transposed)) if transposed else ids
    ids = ids.reshape(tuple(sizes.values()))
    wanted = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", over)
    # A part 'b':(pre)size of an axis: its index is pre * size * rest, of which the middle moves.
    picks = [np.array([0])] * len(sizes)
    for name, before, size in wanted:
        axis = list(sizes).index(name)
        if size:
            rest = sizes[name] // (int(before) * int(size))
            extra = np.arange(int(size)) * rest
            picks[axis] = np.unique(np.add.outer(picks[axis], extra))
        else:
            picks[axis] = np.arange(sizes[name])
    members = ids[np.ix_(*picks)].ravel().tolist()
    return members, len(members)


def by_kind(collectives: Sequence[Collective]) -> list[Collective]:
    """Those of a kind on the same axes as one, the most bytes first."""
    sums = collections.defaultdict[tuple[str, tuple[str, ...], int, bool], list[Collective]](list)
    for c in collectives:
        sums[(c.kind, c.axes, c.devices, c.crosses_slices)].append(c)
    merged = [
        Collective(
            kind,
            axes,
            devices,
            sum(c.times for c in parts),
            sum(c.sent for c in parts),
            crosses,
            "",
        )
        for (kind, axes, devices, crosses), parts in sums.items()
    ]
    return sorted(merged, key=lambda c: -c.sent)
