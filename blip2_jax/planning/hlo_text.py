"""The text of an XLA program, parsed: computations, each with its operations."""

import dataclasses
import math
import re

BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction of a compiled program, as its text has it."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    argument: str  # what stands between the parentheses: the value of a constant
    root: bool

    def called(self, key: str) -> str:
        """The computation that an attribute names, as `body=%NAME`; "" if it names none."""
        match = re.search(rf"\b{key}=%([\w.\-]+)", self.attributes)
        return match.group(1) if match else ""


Computation = dict[str, Op]

_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{\s*$")

_LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")

ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, each a dict of its operations by name; and the entry's name."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header.group(2), {})
            if header.group(1):
                entry = header.group(2)
        elif start := _LINE.match(line):
            rest = re.sub(r"/\*.*?\*/", "", line[start.end() :])
            end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
            shape, rest = rest[:end], rest[end:].lstrip()
            opcode, _, _ = rest.partition("(")
            close = _closing(rest, len(opcode))
            argument = rest[len(opcode) + 1 : close]
            operands = tuple(re.findall(r"%([\w.\-]+)", argument))
            name, root = start.group(2), bool(start.group(1))
            op = Op(name, shape, opcode, operands, rest[close + 1 :], argument, root)
            current[name] = op
    if not entry:
        raise ValueError("This is not the text of an XLA program: it has no ENTRY computation.")
    return computations, entry


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError(f"A parenthesis does not close: {text[start : start + 80]}")


def num_bytes(shape: str) -> float:
    """Of an array or of a tuple of them, as XLA writes shapes."""
    total = 0.0
    for kind, dims in ARRAY.findall(shape):
        bits = BITS.get(kind) or int((re.search(r"\d+", kind) or [0])[0])
        total += bits / 8 * math.prod(dims_of(dims))
    return total


def find(pattern: str | re.Pattern[str], text: str) -> re.Match[str]:
    """What must be there, as XLA writes programs."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"XLA writes this program in a way that is not known: {text[:200]}")
    return match


def dims_of(text: str) -> list[int]:
    """Numbers between commas, as in a shape or a list of dimensions."""
    return [int(n) for n in text.split(",") if n]
