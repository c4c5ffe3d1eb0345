"""Batches: their sizes are powers of two, sharded over the devices; results are concatenated.

So each compiled function compiles a handful of programs at most, and the result for an example does
not depend on the rest of its batch.
"""

import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from blip2_jax.runtime.mesh import batch_sharding
from blip2_jax.runtime.watchdog import alive

log = logging.getLogger(__name__)

# (start, stop) -> arrays of the examples start .. stop - 1, one for each argument of a compiled
# function.
BatchReader = Callable[[int, int], list[Any]]


class Batcher:
    """Runs compiled functions batch by batch.

    Args:
      mesh: the devices that hold the parameters; None: those they are on.
      batch_size: examples that are computed at once, at most.
    """

    def __init__(self, mesh: Mesh | None, batch_size: int):
        self.mesh, self.batch_size = mesh, batch_size

    def map_batches(
        self,
        function: Callable[..., Any],
        params: Any,
        count: int,
        read: BatchReader,
        *,
        progress: str = "",
        skipped: dict[int, str] | None = None,
    ) -> Any:
        """Applies a compiled function batch by batch, and concatenates the results.

        Args:
          function: called as `function(params, *arrays)`.
          params: its first argument.
          count: number of examples.
          read: gives their arrays.
          progress: title of a progress bar, "" for none.
          skipped: examples that `read` puts in here (with the reason) become NaN.

        Returns:
          NumPy arrays whose first axis is `count` long.
        """
        results = []
        with tqdm(total=count, desc=progress, leave=False, disable=not progress or None) as bar:
            for start in range(0, count, self.batch_size):
                stop = min(start + self.batch_size, count)
                arrays = self.put(read(start, stop), self.padded_size(stop - start))
                result = fetch(function(params, *arrays))
                results.append(jax.tree.map(lambda x: x[: stop - start], result))  # noqa: B023
                alive()
                bar.update(stop - start)
        whole = jax.tree.map(lambda *xs: np.concatenate(xs), *results)
        if skipped:
            report_skipped(skipped)
            whole[list(skipped)] = np.nan
        return whole

    def padded_size(self, count: int) -> int:
        """Batch size of the program that computes `count` examples."""
        return self.divisible(min(power_of_two(count), self.batch_size))

    def divisible(self, size: int) -> int:
        """The next batch size that divides over the devices."""
        if self.mesh is None:
            return size
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return -(-size // shards) * shards

    def put(self, arrays: Sequence[Any], size: int) -> list[jax.Array]:
        """Arrays on the devices, padded to `size` examples by repeating the first."""
        padded = [
            np.concatenate([x, np.repeat(x[:1], size - len(x), axis=0)]) if len(x) < size else x
            for x in arrays
        ]
        if self.mesh is None:
            return jax.device_put(padded)
        sharding = batch_sharding(self.mesh)
        if sharding.is_fully_addressable:
            return jax.device_put(padded, sharding)
        return [  # of a mesh over several processes, each puts its own part
            x
            if isinstance(x, jax.Array)
            else jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
            for x in padded
        ]


def fetch(result: Any) -> Any:
    """Arrays of the devices as NumPy's, whole on every process."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(result)):
        return jax.device_get(result)
    return multihost_utils.process_allgather(result, tiled=True)


def report_skipped(skipped: dict[int, str] | None) -> None:
    """Logs which images could not be read, and why."""
    for number, reason in (skipped or {}).items():
        log.warning("Image %d was skipped: %s.", number, reason)


def check_batch_size(batch_size: Any) -> int:
    """The batch size as an int, which it must be, from 1 on; ValueError if not."""
    whole = isinstance(batch_size, float) and batch_size.is_integer()
    try:
        size = int(batch_size) if whole else operator.index(batch_size)
    except TypeError:
        size = 0
    if size < 1 or isinstance(batch_size, bool):
        raise ValueError(f"batch_size is {batch_size!r}; it must be a whole number from 1 on.")
    return size


def power_of_two(count: int, least: int = 1) -> int:
    """The least power of two from `count` on, and at least `least`."""
    return max(least, 1 << (count - 1).bit_length())
