"""TPU slices by the names that they have in the cloud, whether or not there is one at hand.

    v5e-256, v6e-64       256 and 64 chips
    v5p-128, v4-128       128 TensorCores, which are 64 chips: the cloud counts cores there
    v5p-4x4x8             by its shape, in chips
    2xv5e-256             two of them, joined by the data center's network

Devices that are not there come from libtpu, which compiles for them on any machine.
"""

import contextlib
import dataclasses
import math
import os
import re
from typing import Any

from jax.experimental import topologies

from blip2_jax.planning.chips import CHIPS, Chip

Shapes = dict[int, tuple[int, ...]]  # by the number of chips

FLAT: Shapes = {
    1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16),
    256: (16, 16),
}  # fmt: skip
CUBES: Shapes = {
    4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8),
    256: (4, 8, 8), 512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16),
}  # fmt: skip
# How the cloud offers each generation: chips -> shape, and what its names count in a chip.
OFFERED: dict[str, tuple[Shapes, int]] = {
    "v4": (CUBES, 2),
    "v5p": (CUBES, 2),
    "v5e": (FLAT, 1),
    "v6e": (FLAT, 1),
}

# What libtpu would otherwise look for on a TPU machine. It loads here beside any other process
# that compiles, because no chip is touched.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


class NoCompiler(RuntimeError):
    """libtpu is missing, or cannot be loaded."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """One or several slices of one kind.

    Attributes:
      name: as it was given.
      chip: its row in the table of chips.
      shape: chips of one slice along each axis of its torus.
      num_slices: how many.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def num_chips(self) -> int:
        """Of all slices together."""
        return self.num_slices * math.prod(self.shape)

    def devices(self) -> list[Any]:
        """Devices to compile for, one a chip.

        Raises:
          NoCompiler: libtpu is missing, or cannot be loaded.
        """
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        kwargs: dict[str, Any] = {}
        if math.prod(self.shape) == 1:
            kwargs["chips_per_host_bounds"] = (1, 1, 1)
        if self.num_slices > 1:
            kwargs["num_slices"] = self.num_slices
        if self.chip.name == "v4":  # two cores that are one device
            kwargs |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
        shape = "x".join(map(str, self.shape))
        try:
            description = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{self.chip.name}:{shape}", **kwargs
            )
        except Exception as error:  # whatever a plugin that cannot be loaded raises
            raise NoCompiler(
                f"libtpu, which compiles for TPUs, cannot be loaded: {_first_line(error)} "
                "Install it with pip install 'blip2_jax[plan]' (Linux; no TPU is needed)."
            ) from error
        return list(description.devices)


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return line if line.endswith(".") else line + "."


def parse(name: str) -> Slice:
    """The slice of a name.

    Raises:
      ValueError: no such slice; the message lists those there are.
    """
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(v\d+(?:e|p|litepod)?)-([\dx]+)", name.strip().lower())
    if match:
        count, kind, size = match.groups()
        kind = {"v5litepod": "v5e"}.get(kind, kind)
        with contextlib.suppress(KeyError, ValueError):
            shapes, cores = OFFERED[kind]
            if "x" in size:
                shape = tuple(map(int, size.split("x")))
                if len(shape) != len(shapes[4]) or math.prod(shape) < 1:
                    raise ValueError
            else:
                chips, half = divmod(int(size), cores)
                if half:
                    raise ValueError
                shape = shapes[chips]
            return Slice(name, CHIPS[kind], shape, int(count or 1))
    known = "\n".join(
        f"  {kind}: {', '.join(f'{kind}-{chips * cores}' for chips in shapes)}"
        + (f" (TensorCores, {cores} a chip)" if cores > 1 else " (chips)")
        for kind, (shapes, cores) in OFFERED.items()
    )
    raise ValueError(
        f"There is no TPU slice {name!r}. There are\n{known}\nalso by shape (v5p-4x4x8), and "
        "several of them (2xv5e-256)."
    )
