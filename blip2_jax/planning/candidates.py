"""Other ways to run a recipe on a slice: batch sizes, meshes, and what saves memory."""

import math
from collections.abc import Iterator

from ml_collections import ConfigDict

from blip2_jax import recipe
from blip2_jax.planning import topology
from blip2_jax.runtime import mesh as meshes

TOWERS = ("vit", "qformer", "llm")


def nearest_batch(config: ConfigDict, tpu_slice: topology.Slice) -> tuple[ConfigDict, str]:
    """The recipe with the batch size next to its own that the slice's mesh divides.

    Returns:
      The config with another batch size, and a line that says so and what else a run should set
      ("" where nothing is changed). The peak learning rate goes with the root of the batch size,
      the rule for Adam (Malladi et al. 2022, "On the SDEs and Scaling Rules for Adaptive Gradient
      Algorithms"); steps are as many as see the same number of samples.
    """
    before = config.data.batch_size
    sizes = meshes.mesh_sizes(config.mesh, tpu_slice.num_chips)
    unit = math.prod(sizes[: len(meshes.BATCH_AXES)]) * config.stage.accumulate
    after = max(unit, round(before / unit) * unit)
    if after == before:
        return config, ""
    config = ConfigDict(config.to_dict())
    config.data.batch_size = after
    rate = config.optim.peak_lr * math.sqrt(after / before)
    steps = round(config.steps * before / after)
    return config, (
        f"The nearest batch size is {after} (the recipe's is {before}): "
        f"--config.data.batch_size={after} --config.optim.peak_lr={rate:.4g} "
        f"--config.steps={steps}; the rate goes with the root of the batch size."
    )


def candidates(config: ConfigDict, tpu_slice: topology.Slice) -> Iterator[list[ConfigDict]]:
    """For each sensible mesh, the ways to run on it: the recipe's own, then those of less memory.

    `fsdp` goes from all chips of a slice down (parameters whole in more places, fewer bytes to
    gather), `tensor` splits what is too large for a single chip's part of the batch.
    """
    chips = tpu_slice.num_chips // tpu_slice.num_slices
    shapes = [
        (tpu_slice.num_slices * chips // (fsdp * tensor), fsdp, tensor)
        for tensor in (1, 2, 4)
        for fsdp in (n for n in reversed(_divisors(chips // tensor)) if 16 * n >= chips)
        if chips % (fsdp * tensor) == 0
    ]
    for data, fsdp, tensor in sorted(shapes, key=lambda s: (s[2], -s[1])):
        batch_per_shard, rest = divmod(config.data.batch_size, data * fsdp)
        if rest or not batch_per_shard:
            continue
        base = ConfigDict(config.to_dict())
        base.mesh.update({"data": data, "fsdp": fsdp, "tensor": tensor})
        yield [base, *leaner_variants(base, batch_per_shard)]


def leaner_variants(config: ConfigDict, batch_per_shard: int) -> Iterator[ConfigDict]:
    """Variants that need less and less memory: stage 2 by accumulation, stage 1 by more remat."""
    leaner = ConfigDict(config.to_dict())
    if config.stage.name == "stage2":
        for parts in _divisors(batch_per_shard):
            if parts > config.stage.accumulate:
                leaner.stage.accumulate = parts
                yield ConfigDict(leaner.to_dict())
    elif config.model.qformer.remat == "none":
        for policy in ("dots", "full"):
            leaner.model.qformer.remat = policy
            yield ConfigDict(leaner.to_dict())


def quicker_variants(config: ConfigDict) -> Iterator[ConfigDict]:
    """Variants that recompute less, if memory allows."""
    towers = [tower for tower in TOWERS if config.model[tower].remat == "full"]
    for policy in ("none", "dots") if towers else ():
        quicker = ConfigDict(config.to_dict())
        for tower in towers:
            quicker.model[tower].remat = policy
        yield quicker


def remedies(run: recipe.Recipe) -> list[str]:
    """What to try, the cheapest first."""
    batch_per_shard = run.config.data.batch_size // meshes.num_batch_shards(run.mesh)
    tries = []
    for leaner in leaner_variants(run.config, batch_per_shard):
        if leaner.stage.accumulate != run.config.stage.accumulate:
            tries.append(f"--config.stage.accumulate={leaner.stage.accumulate}")
        else:
            tries.append(f"--config.model.qformer.remat={leaner.model.qformer.remat}")
    for tower in ("vit", "llm"):
        if tower in towers_of(run) and run.config.model[tower].remat == "none":
            if tower == "llm" or tower in run.abstract_state["params"]:
                tries.append(f"--config.model.{tower}.remat=full")
    return [*tries[:3], "--mesh=search", "a larger slice, or a smaller batch"]


def towers_of(run: recipe.Recipe) -> set[str]:
    """Names of the towers that a recipe has, trained or frozen."""
    return run.abstract_state["params"].keys() | run.abstract_frozen.keys()


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
