"""What a name table is made of: rows that pair tensors of a checkpoint with parameters here.

A row pairs a tensor's name with the paths of the parameters it holds. `{i}` in a name is the layer,
which here is a leading axis of a stack. A `KINDS` entry turns one side's array into the other's.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Kind:
    """How an array is stored.

    Attributes:
      load, save: ours of theirs, and theirs of ours.
      stored: their shape, of ours.
      transposed: whether slices of ours are slices of theirs with the axes in reverse (True) or in
        the same order (False); None if a piece of ours cannot be cut out of theirs.
    """

    load: Callable[[Array], Array]
    save: Callable[[Array], Array]
    stored: Callable[[Shape], Shape]
    transposed: bool | None = None


def _conv_to_linear(weight: Array) -> Array:
    """[D, 3, P, P] -> [P * P * 3, D]: rows are a patch's pixels, row by row, RGB innermost."""
    return weight.transpose(2, 3, 1, 0).reshape(-1, len(weight))


def _linear_to_conv(kernel: Array) -> Array:
    return kernel.reshape(*_conv_shape(kernel.shape)[2:], 3, -1).transpose(3, 2, 0, 1)


def _conv_shape(shape: Shape) -> Shape:
    side = round((shape[0] / 3) ** 0.5)
    return (shape[1], 3, side, side)


def _same(x: Any) -> Any:
    return x


KINDS = {
    "same": Kind(_same, _same, _same, transposed=False),
    # torch stores [out, in]
    "linear": Kind(lambda x: x.T, lambda x: x.T, lambda shape: shape[::-1], transposed=True),
    "patches": Kind(_conv_to_linear, _linear_to_conv, _conv_shape),
    "class": Kind(lambda x: x[None, None], lambda x: x[0, 0], lambda shape: shape[2:]),
    "positions": Kind(lambda x: x[None], lambda x: x[0], lambda shape: shape[1:]),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of tensor.

    Attributes:
      theirs: its name.
      ours: paths of the parameters that it holds, one after the other along its first axis; None
        is a part that we have no parameter for and that is written as zeros (EVA's key bias).
      kind: a `KINDS` name.
      stack: how many leading axes of ours `{i}` counts through (0: there is one such tensor).
      every: `{i}` goes up by this much from one to the next.
    """

    theirs: str
    ours: tuple[str | None, ...]
    kind: str = "same"
    stack: int = 0
    every: int = 1


@dataclasses.dataclass(frozen=True)
class Table:
    """All tensors of a family in a format.

    Attributes:
      rows: the tensors that hold parameters.
      copies: tensors that repeat another one, by name: files have them or not, we write none.
      ignored: regexes of tensors that hold nothing we need (buffers, heads that BLIP-2 drops).
    """

    rows: tuple[Row, ...]
    copies: dict[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def inside(self, ours: str, theirs: str = "") -> "Table":
        """This table for a tower that stands inside a model: prefixes for both sides."""
        rows = tuple(
            dataclasses.replace(
                row, theirs=theirs + row.theirs, ours=tuple(p and ours + p for p in row.ours)
            )
            for row in self.rows
        )
        copies = {theirs + name: theirs + other for name, other in self.copies.items()}
        return Table(rows, copies, tuple(re.escape(theirs) + p for p in self.ignored))


def join(*tables: Table) -> Table:
    """Several tables as one."""
    copies = {name: other for table in tables for name, other in table.copies.items()}
    rows = tuple(row for table in tables for row in table.rows)
    return Table(rows, copies, tuple(p for table in tables for p in table.ignored))
